"""Continue or answer prompts with a model.

python decode.py --gin_file=configs/decode/smollm2.gin --prompt="Why is the sky blue?"

Several processes, started like those of train.py, answer together the prompts of process 0, which prints the answers.

With `--compile_for=v5p:2x2x1` nothing is answered: prefill and decoding are compiled for that TPU slice and what they
need is printed; the exit status says whether both fit (0) or not (1).
"""

import argparse
import functools
import sys
from pathlib import Path

import jax

from lcjax import settings
from lcjax.parallel.slices import named_slice
from lcjax.parallel.startup import Cluster, add_flags, check_agreement, gather
from lcjax.serve.job import Generate
from lcjax.serve.size import size_decoding


def main() -> None:
    """Prompts come from --prompt (repeatable), --prompt_file (one prompt, the whole file), or standard input."""
    parser = settings.flags("Answer prompts with a model; everything else is set by gin.")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="(repeatable)")
    parser.add_argument("--prompt_file", action="append", default=[], type=Path, metavar="FILE", help="(repeatable)")
    add_flags(parser)
    parser.add_argument("--compile_for", nargs="?", const="", metavar="SLICE", help="size decoding for a TPU slice")
    launch = settings.main("generate", parser=parser)
    if launch.flags.compile_for is not None:
        sys.exit(size(launch.job, launch.flags.compile_for))
    with settings.refusals(parser.prog):
        Cluster.of(launch.flags).join()
        check_agreement(launch.config)
        first = jax.process_index() == 0
        prompts = gather(read(launch.flags) if first else [])[0]
        show = functools.partial(print, end="", flush=True) if first else lambda text: None
        completions, report = launch.job.run(prompts, show)
    if not first:
        return
    print(report, file=sys.stderr)
    if launch.output:
        launch.output.mkdir(parents=True, exist_ok=True)
        (launch.output / "config.gin").write_text(launch.config)
        (launch.output / "answers.txt").write_text("\n\n".join(c.text for c in completions) + "\n")


def read(flags: argparse.Namespace) -> list[str]:
    """The prompts that were given."""
    prompts = flags.prompt + [path.read_text(encoding="utf-8") for path in flags.prompt_file]
    if not prompts and not sys.stdin.isatty():
        prompts = [text for text in [sys.stdin.read()] if text]
    return prompts


def size(job: Generate, name: str) -> int:
    """Compile the programs for the slice `name`, or the one that the job's mesh names."""
    fits = True
    with settings.refusals("decode.py"):
        where = named_slice(name or (job.mesh and job.mesh.slice) or "")
        for sizing in size_decoding(job, where):
            print(sizing.text(), flush=True)
            fits &= sizing.fits
    return 0 if fits else 1


if __name__ == "__main__":
    main()
