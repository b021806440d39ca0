"""Options shared by several commands."""

import click

overrides_option = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Any setting; 'dreambooth settings' lists them."
)
tracking_uri_option = click.option("--tracking-uri", help="MLflow's address; default: sqlite:///mlflow.db.")
address_option = click.option(
    "--address", help="Ray cluster to join (cluster.address), or 'auto'; default: start Ray here."
)
quiet_option = click.option("--quiet", "silent", is_flag=True, help="Print only warnings and the result.")


graph_option = click.option(
    "--graph",
    type=click.Choice(["auto", "off"]),
    default="off",
    show_default=True,
    help="Replay sampling steps as CUDA graphs on a GPU; see cluster.graph_sampling.",
)
