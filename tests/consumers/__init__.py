"""AF_XDP ports with the programs that people use on them, as Debian builds them. They need root.

The programs and all that they need are fetched once from a Debian suite, unpacked below
``.cache/consumers/`` and run from there; nothing is installed.
"""
