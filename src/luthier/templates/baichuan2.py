"""Baichuan2: ``{system}<reserved_106>q<reserved_107>a</s>``; no jinja was published, no BOS, no newline.

A reply's ``</s>`` stays where it is in a longer conversation (docs/decisions/0007-baichuan2-turns.md).
``<reserved_106>`` opens the user's turn: a model that writes it has ended its own.
Source: the published generation_utils.py (build_chat_input) and fine-tune.py.
"""

from __future__ import annotations

from luthier.templates.turns import Turns

FORMS = (
    Turns(
        name="baichuan2",
        system=("", ""),
        user=("<reserved_106>", ""),
        reply="<reserved_107>",
        stop=("</s>", "<reserved_106>"),
        markers=("<reserved_106>", "<reserved_107>", "</s>"),
    ),
)
