"""`flexmemory explore CHECKPOINT`: see the memory, in a browser on this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    import torch

    from flexmemory.interpret.reader import MemoryIndex
    from flexmemory.model.checkpoint import Checkpoint


def explore(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    index: Path | None = None,
    counts: Path | None = None,
    compare: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
    port: int = 8642,
    host: str = "127.0.0.1",
    open: tyro.conf.FlagCreatePairsOff[bool] = True,
    export: Path | None = None,
    device: str = "auto",
) -> None:
    """Open the explorer: tokens, keys, map, clusters, layers, prompts, edits. The index is built if there is none.

    Args:
        checkpoint: A checkpoint or run folder.
        index: Folder of the index; by default beside the checkpoint, with `index-` before its name.
        counts: A folder that `flexmemory prepare` wrote with the model's tokenizer, for an index that must be built.
        compare: Another checkpoint of the same shape and tokenizer, a ToL store or a patch, for the page Diff; patches
            can be tried on the page Edit, too. May be given several times.
        port: Where to serve; 0 takes a free port.
        host: Address to listen at. Whoever reaches it can run the model: by default this machine alone.
        open: Open a browser.
        export: Write the pages to this new folder, for any web server, and serve nothing; for small models.
        device: Where the model runs: cpu, cuda, cuda:1 ..., or auto: the GPU where there is one.
    """
    import torch

    from flexmemory.device import resolve_device
    from flexmemory.model.checkpoint import Checkpoint

    if not 0 <= port < 65536:
        raise ValueError(f"--port must be 0 to 65535, got {port}")
    if export is not None and export.exists():
        raise FileExistsError(f"{export} already exists; choose another folder or remove it")
    place, opened = resolve_device(device), Checkpoint.open(checkpoint)
    require_server()
    from flexmemory.serve.comparing import comparable
    from flexmemory.serve.explorer import create_app, hosts_of, serve
    from flexmemory.serve.export import check_size, write_export
    from flexmemory.serve.live import LiveModel
    from flexmemory.serve.records import Records

    hosts = hosts_of(host)
    for other in compare:
        comparable(other, opened)  # before an index is built
    if export is not None:
        check_size(opened.config)
    records = Records(opened_index(opened, index, counts=counts, device=place))
    dtype = torch.promote_types(opened.stored_dtype(), torch.float32)
    live = LiveModel(opened, records, device=place, dtype=dtype)
    name = checkpoint.resolve().name
    if export is not None:
        print(f"{write_export(records, live, export, name=name)} files in {export}")
        return
    app = create_app(records, live, checkpoint=opened, name=name, compare=compare, hosts=hosts)
    serve(app, host=host, port=port, open_browser=open)


def opened_index(
    checkpoint: Checkpoint, folder: Path | None, *, counts: Path | None, device: torch.device
) -> MemoryIndex:
    """The index in `folder`, built if there is none.

    Raises:
        ValueError: it is of another checkpoint, or damaged.
    """
    from flexmemory.cli.tol import counts_of
    from flexmemory.interpret.index import build_index
    from flexmemory.interpret.reader import MemoryIndex

    place = checkpoint.path.with_name(f"index-{checkpoint.path.name}") if folder is None else folder
    if place.exists():
        return MemoryIndex.open(place, checkpoint=checkpoint)
    return build_index(
        checkpoint,
        place,
        counts=None if counts is None else counts_of(counts, checkpoint),
        counts_source="" if counts is None else str(counts),
        device=device,
    )


def require_server() -> None:
    """Say what to install where the server's libraries are missing.

    Raises:
        ImportError: they are.
    """
    missing = [name for name in ("starlette", "uvicorn", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"the explorer needs {', '.join(missing)}, not installed here; pip install 'flexmemory[serve]'"
        )


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    tyro.cli(explore, args=argv, prog="flexmemory explore")
    return 0
