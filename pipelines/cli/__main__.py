"""`python -m pipelines.cli`: the same as `dreambooth`."""

from pipelines.cli import main

main()
