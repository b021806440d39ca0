"""Runs a configuration on a cluster that runs already and prints what its lane reports; started by test_elastic.py.

    RAY_AUTH_TOKEN=... python train_elsewhere.py CONFIG.yaml OUTPUT.json

Every message is a line of JSON. OUTPUT gets the history of the finished training, and how many workers ended it.
"""

import json
import sys
from pathlib import Path

from dreambooth.config.settings import load_config
from pipelines.driver import single
from pipelines.driver.console import RunConsole
from pipelines.driver.personalize import personalize
from pipelines.driver.run_view import RunView
from pipelines.storage.files import join, read_json
from pipelines.tasks import Message


class Printing(RunView):
    """Prints every message."""

    def message(self, name: str, message: Message) -> None:
        """Print a message."""
        print(json.dumps(message), flush=True)


if __name__ == "__main__":
    configuration, output = load_config(Path(sys.argv[1])), Path(sys.argv[2])
    single.RunView = Printing  # type: ignore[misc]
    result = personalize(configuration, RunConsole(quiet=True))
    record = read_json(join(result.run_uri, "training", f"{result.summary['key']}.json"))
    output.write_text(json.dumps({"history": record["history"], "workers": len(record["peak_memory_bytes"])}))
