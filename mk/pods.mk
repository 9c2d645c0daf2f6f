# Pod configurations, each compiled for the TPU slice that it names; no TPU is needed.
.PHONY: pods

pods: setup  ## compile every configs/run/pod/*.gin for its slice and print what it needs (RUN=one.gin for one)
	@failed=0; for run in $(or $(RUN),$(wildcard configs/run/pod/*.gin)); do \
		echo "== $$run"; $(BIN)/python train.py --gin_file=$$run --compile_for || failed=1; done; exit $$failed
