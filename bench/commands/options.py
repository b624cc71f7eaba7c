"""Options that several commands have."""

from __future__ import annotations

import click

PAGE = "report.html"
as_json = click.option("--format", "layout", type=click.Choice(["text", "json"]), default="text", show_default=True)
