"""Model families: how each writes thoughts and calls, and what reads them back.

To add a family:

1. Write its ``Family`` beside those that write calls alike, or in a module of its own; `family.py` explains the fields.
2. Add it to ``FAMILIES`` in `table.py`, before every family whose signs its templates have too.
3. Write a template with its markers into tests/data/chat_templates, and name it in
   tests/server/convert/test_tool_rendering.py. `scripts/check_templates` tries the published one.
4. Write what its models answer into tests/data/transcripts; tests read it in every cut.
5. Only where no ``arguments`` of ``CallSyntax`` fit, add a class there and its rule to server/grammar/tool_calls.py.

Whether a template has a switch of thinking, and which, is found out by trying it (server/convert/template_probe.py).
"""
