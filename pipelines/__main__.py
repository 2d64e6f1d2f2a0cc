"""`python -m pipelines` is the `genpipe` command."""

from pipelines.cli import main

if __name__ == "__main__":
    main()
