"""MemoryLLM and Flex-MemoryLLM: feed-forward memory that is looked up, read and edited by token."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("flexmemory")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.1.0"
