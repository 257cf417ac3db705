"""``luthier doctor``"""

from __future__ import annotations

import json

import typer

from luthier.cli.common import Json


def run(as_json: Json = False) -> None:
    """Show versions, devices and extras, and try one training step of a tiny model."""
    from luthier.verbs.doctor import doctor

    found = doctor()
    if as_json:
        print(json.dumps(found))
    else:
        memory = f", {found['memory_bytes'] / 1e9:.0f} GB" if found["memory_bytes"] else ""
        print(f"luthier   {found['luthier']}, Python {found['python']}, {found['system']}")
        print(f"device    {found['device']}, {found['cores']} cores ({found['threads']} threads){memory}")
        print(f"trains in {found['trains_in']}")
        for name, version in found["packages"].items():
            print(f"  {name:14}{version or 'missing'}")
        for name, there in found["extras"].items():
            print(f"  extra {name:11}{'there' if there else f'not installed (pip install luthier[{name}])'}")
        smoke = found["smoke"]
        print(f"one step  {'works' if smoke['ok'] else 'FAILS: ' + smoke['error']}")
    if not found["smoke"]["ok"]:
        raise typer.Exit(1)
