"""`affect-verify BUNDLE`: is this bundle, on this machine, still the exported model?

Exit codes: 0 it is, 1 refused, 2 usage.
"""

import argparse
import sys

__all__ = ["verify_main"]


def verify_main(argv: list[str] | None = None) -> int:
    """Hashes every file, checks who signed the bundle if asked to, builds the engines that a device builds itself,
    replays verify.npz, and prints each figure."""
    from affect_edge._recognizer import SHIPPED
    from affect_runtimes.base import machine
    from affect_runtimes.errors import AffectError
    from affect_runtimes.model import BundleModel
    from affect_runtimes.verify import replay_here

    parser = argparse.ArgumentParser(prog="affect-verify", description=verify_main.__doc__)
    parser.add_argument("bundle", nargs="?", default=SHIPPED, help="folder of the bundle; default: the shipped student")
    parser.add_argument(
        "--trust",
        action="append",
        metavar="KEY.pub",
        help="refuse a bundle that this key did not sign as it is; of several, one is enough",
    )
    parser.add_argument("--threads", type=int, default=1, help="for each engine (default 1)")
    parser.add_argument(
        "--trtexec", action="store_true", help="of a bundle for TensorRT: print the commands of trtexec, and stop"
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.trtexec:
            return _print_trtexec(arguments.bundle, arguments.trust)
        model = BundleModel(arguments.bundle, arguments.threads, trust=arguments.trust)
        figures = replay_here(model)
    except AffectError as error:
        print(f"affect-verify: {error}", file=sys.stderr)
        return 1
    manifest = model.bundle.manifest
    name = f"{manifest.model_name} {manifest.model_version}"
    print(f"{name} for {manifest.target_name}, weights {manifest.weights_sha256[:12]}")
    if not manifest.trained:
        print("RANDOM WEIGHTS: never trained, the outputs mean nothing")
    for figure in figures:
        print(f"  {figure}")
    if model.bundle.signed_by is not None:
        print(f"signed by {model.bundle.signed_by}, which is trusted")
    print(f"verified: {model.engine_words} ({machine()}) is the exported model, within its bounds")
    return 0


def _print_trtexec(path: str, trust: list[str] | None) -> int:
    from affect_runtimes.bundle import Bundle
    from affect_runtimes.errors import InputError
    from affect_runtimes.tensorrt.library import trtexec

    bundle = Bundle.open(path, trust)
    manifest = bundle.manifest
    if manifest.engine != "tensorrt":
        raise InputError(f"--trtexec: {path} is for {manifest.engine}, not for TensorRT")
    for graph in manifest.graphs:
        print(trtexec(graph, str(bundle.path / graph.file), manifest.max_batch))
    return 0


if __name__ == "__main__":
    sys.exit(verify_main())
