"""The environment variables that luthier reads; settings of a run are never among them.

CXX                                   the C++ compiler of the kernels (``kernels.native``)
LUTHIER_CACHE                         the directory of all caches (``_util.files``)
XDG_CACHE_HOME, LOCALAPPDATA          without it, the directory in which the directory ``luthier`` is (Linux, Windows)
HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE  ``luthier pull`` reports why it cannot download (``hub.huggingface``)
LUTHIER_KEEP_FREED_MEMORY             "1": glibc may be told to keep freed memory (``devices.device``). The command line
                                      sets it; a program that uses luthier as a library keeps its allocator as it is
                                      unless it sets this itself.

Variables of other libraries that the command line sets, unless they are set already:

LRU_CACHE_CAPACITY, ONEDNN_PRIMITIVE_CACHE_CAPACITY
    the number of prepared matrix products that torch and oneDNN keep, 1,024 by default. In bfloat16, one is prepared
    for every number of tokens and every layer shape, and each needs about 0.6 MB. A micro-batch uses about 20.
"""

KEEP_FREED_MEMORY = "LUTHIER_KEEP_FREED_MEMORY"
CACHE = "LUTHIER_CACHE"
PREPARED_PRODUCTS = {
    "LRU_CACHE_CAPACITY": "16",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
}
