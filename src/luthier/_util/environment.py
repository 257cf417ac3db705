"""The environment variables that luthier reads.

KEEP_FREED_MEMORY  "1": glibc may be told to keep freed memory (``devices.device``). The command line sets it; a program
                   that uses luthier as a library keeps its allocator as it is unless it sets this itself.
"""

KEEP_FREED_MEMORY = "LUTHIER_KEEP_FREED_MEMORY"
