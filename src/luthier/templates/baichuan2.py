"""Define Baichuan2's chat format: ``{system}<reserved_106>q<reserved_107>a</s>``, without BOS and newlines.

No jinja template was published. A reply keeps its ``</s>`` in longer conversations
(docs/decisions/0007-baichuan2-turns.md). ``<reserved_106>`` starts the user's turn, so a model that writes it has ended
its own turn.
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
