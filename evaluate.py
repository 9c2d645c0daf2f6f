"""Measure a model at long context.

python evaluate.py --gin_file=configs/eval/smollm2_perplexity.gin --output=runs/book \\
    --gin_bindings='perplexity.text="book.txt"'
"""

from lcjax import settings


def main() -> None:
    """Writes results.json, plots and single results into --output."""
    launch = settings.main("evaluate")
    with settings.refusals("evaluate.py"):
        if launch.output is None:
            raise ValueError("--output is missing; give the folder for results.json")
        tables = launch.job.run(launch.output, launch.config)
    for name, table in tables.items():
        print(name, ", ".join(f"{length}: {value:.4g}" for length, value in table.items()))
    print(f"written to {launch.output / 'results.json'}")


if __name__ == "__main__":
    main()
