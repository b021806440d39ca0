"""Options that several commands have, each defined once."""

import click

overrides_option = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Any setting; 'dreambooth settings' lists them."
)
tracking_uri_option = click.option("--tracking-uri", help="MLflow; sqlite:///mlflow.db here if left out.")
address_option = click.option(
    "--address", help="cluster.address: 'auto' or that of a Ray cluster to join; started here if left out."
)
quiet_option = click.option("--quiet", "silent", is_flag=True, help="Print only warnings and the result.")
