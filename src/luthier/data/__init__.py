"""Files -> conversations: readers, row formats, the report on every row, control tokens in people's text."""
