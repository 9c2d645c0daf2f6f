"""Continue or answer prompts with a model.

python decode.py --gin_file=configs/decode/smollm2.gin --prompt="Why is the sky blue?"
"""

import sys
from pathlib import Path

from lcjax import settings


def main() -> None:
    """Prompts come from --prompt (repeatable), --prompt_file (one prompt, the whole file), or standard input."""
    parser = settings.flags("Answer prompts with a model; everything else is set by gin.")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="(repeatable)")
    parser.add_argument("--prompt_file", action="append", default=[], type=Path, metavar="FILE", help="(repeatable)")
    launch = settings.main("generate", parser=parser)
    with settings.refusals(parser.prog):
        prompts = launch.flags.prompt + [path.read_text(encoding="utf-8") for path in launch.flags.prompt_file]
        if not prompts and not sys.stdin.isatty():
            prompts = [text for text in [sys.stdin.read()] if text]
        completions, report = launch.job.run(prompts, lambda text: print(text, end="", flush=True))
    print(report, file=sys.stderr)
    if launch.output:
        launch.output.mkdir(parents=True, exist_ok=True)
        (launch.output / "config.gin").write_text(launch.config)
        (launch.output / "answers.txt").write_text("\n\n".join(c.text for c in completions) + "\n")


if __name__ == "__main__":
    main()
