"""DeepSeek-LLM: ``<BOS>User: q\\n\\nAssistant:``, then the model writes a space, its answer and ``<EOS>``.

No system role: the model card says that a system prompt does not suit these models. The published jinja would write it
bare before the first turn (``data.template=jinja`` does so). Source: the checkpoint's chat_template and model card.
"""

from __future__ import annotations

from luthier.templates.turns import Turns

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

FORMS = (
    Turns(
        name="deepseek",
        opening=BOS,
        user=("User: ", "\n\n"),
        reply="Assistant:",
        reply_prefix=" ",
        stop=(EOS,),
        markers=(BOS, EOS),
    ),
)
