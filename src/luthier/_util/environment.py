"""The environment variables that luthier reads; settings of a run are never among them.

CXX                                   the C++ compiler of the kernels (``kernels.native``)
XDG_CACHE_HOME, LOCALAPPDATA          where the cache directory is (``_util.files``)
HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE  ``luthier pull`` reports why it cannot download (``hub.huggingface``)
LUTHIER_KEEP_FREED_MEMORY             "1": glibc may be told to keep freed memory (``devices.device``). The command line
                                      sets it; a program that uses luthier as a library keeps its allocator as it is
                                      unless it sets this itself.
"""

KEEP_FREED_MEMORY = "LUTHIER_KEEP_FREED_MEMORY"
