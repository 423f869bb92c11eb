"""The ranks of a further machine: they load their share and follow the engine of the machine that serves.

deploy/second_node.sh starts this under torchrun and again whenever it ends.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from command_line import Parser
from deploy.configuration import read_yaml
from engine.config import ConfigError
from handler.settings import parse


def read(path: Path) -> Mapping[str, Any]:
    """The first machine's model-config.yaml, checked."""
    content = read_yaml(path)
    parse(content, path.parent)
    if not content.get("torchrun") or content["torchrun"].get("nnodes", 1) < 2:
        raise ConfigError(f"{path}: torchrun.nnodes is 1, so there is nothing to join")
    return content


def follow(path: Path, checkpoint: Path | None) -> None:
    """Load and serve the leader's steps until it is gone."""
    from engine.engine import Engine
    from engine.lifeline import die_with_parent
    from engine.parallel import Launch

    die_with_parent()
    settings = parse(read(path), path.parent)
    launch = Launch.from_environment()
    engine, _ = Engine.load(checkpoint or settings.converted_ckpt_dir, settings, launch)
    logging.getLogger("engine").info("following: rank %d of %d", launch.rank, launch.size)
    engine.follow()


def main(argv: list[str] | None = None) -> int:
    """Follow, or with --torchrun say the flags that torchrun needs on this machine."""
    parser = Parser(prog="python -m deploy.follow", description=main.__doc__)
    parser.add_argument("config", type=Path, metavar="MODEL_CONFIG", help="build/serve/model-config.yaml of node 0")
    parser.add_argument("checkpoint", type=Path, nargs="?", help="the converted folder, if it has another path here")
    parser.add_argument("--torchrun", action="store_true", help="print torchrun's flags and end")
    flags = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        if flags.torchrun:
            run = read(flags.config)["torchrun"]
            print(f"--nnodes {run['nnodes']} --nproc-per-node {run['nproc-per-node']}", end=" ")
            print(f"--rdzv-backend static --rdzv-endpoint {run['rdzv-endpoint']}")
            return 0
        follow(flags.config, flags.checkpoint)
    except ConfigError as error:
        print(f"follow: error: {error}", file=sys.stderr)
        return 2
    except Exception:
        logging.exception("the leader is gone, or this rank failed")
    # A rank ends at once: its process group may wait for others that will not come.
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
