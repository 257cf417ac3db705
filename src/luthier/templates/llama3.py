"""Define Llama 3's chat format: ``<|start_header_id|>user<|end_header_id|>\\n\\nq<|eot_id|>``.

Messages are trimmed, as in the published jinja template. The templates of Llama 3.1 and later write a date, so they are
run as jinja. Source: Meta's Llama 3 model card and chat_template.
"""

from __future__ import annotations

from luthier.templates.turns import Turns

START, END, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"


FORMS = (
    Turns(
        name="llama3",
        opening="<|begin_of_text|>",
        system=(f"{START}system{END}\n\n", EOT),
        user=(f"{START}user{END}\n\n", EOT),
        reply=f"{START}assistant{END}\n\n",
        stop=(EOT,),
        markers=("<|begin_of_text|>", START, END, EOT),
        trim=True,
    ),
)
