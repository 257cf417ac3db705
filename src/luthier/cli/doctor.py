"""The options and output of ``luthier doctor``."""

from __future__ import annotations

import json

import typer

from luthier._util.installation import install_command
from luthier.cli.common import JsonOption


def run(as_json: JsonOption = False) -> None:
    """Show versions, devices and extras, and try one training step of a tiny model."""
    from luthier.verbs.doctor import doctor

    machine = doctor()
    smoke = machine["smoke"]
    if as_json:
        print(json.dumps(machine))
    else:
        memory = f", {machine['memory_bytes'] / 1e9:.0f} GB" if machine["memory_bytes"] else ""
        print(f"luthier   {machine['luthier']}, Python {machine['python']}, {machine['system']}")
        print(f"device    {machine['device']}, {machine['cores']} cores ({machine['threads']} threads){memory}")
        print(f"trains in {machine['trains_in']}")
        for name, version in machine["packages"].items():
            print(f"  {name:14}{version or 'missing'}")
        for name, installed in machine["extras"].items():
            print(f"  extra {name:11}{'installed' if installed else 'not installed'}")
        if not all(machine["extras"].values()):
            print(f"  to install the extra NAME: {install_command('NAME')}")
        print(f"one step  {'works' if smoke['ok'] else 'FAILS: ' + smoke['error']}")
    if not smoke["ok"]:
        raise typer.Exit(1)
