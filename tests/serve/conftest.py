"""The fixtures of serving.py, where the extra `serve` is installed; else nothing here is run."""

from importlib.util import find_spec

if find_spec("uvicorn") is None or find_spec("openai") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from .serving import address, client, folder, served, serving

    __all__ = ["address", "client", "folder", "served", "serving"]
