"""`trunkline-operator`: turns VoiceAgents into pods, routes and Modal apps."""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from trunkline_operator.config import (
    EVICT_IDLE_SECONDS,
    STATUS_SECONDS,
    ConfigError,
    OperatorConfig,
    parse_gateways,
    parse_name,
    parse_region,
)
from trunkline_operator.logs import configure_logging
from trunkline_runtime.contract import ENV_OPERATOR_TOKEN, HEALTH_PORT

ENV_LOG_LEVEL = "TRUNKLINE_LOG_LEVEL"
ENV_PRICES = "TRUNKLINE_PRICES"


def main() -> None:
    raise SystemExit(run(sys.argv[1:], os.environ))


def run(arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """The exit status: 0 after a signal, 2 if the operator was started wrongly."""
    try:
        if arguments[:1] == ["release"]:
            return run_release(arguments[1:])
        config = configured(arguments, env)
        configure_logging(env.get(ENV_LOG_LEVEL) or "INFO")
        # Two seconds of imports, which a wrong flag need not wait for.
        from trunkline_operator.assembly import operate

        asyncio.run(operate(config))
    except ConfigError as error:
        print(f"trunkline-operator: {error}", file=sys.stderr)  # noqa: T201  # its reader is a person
        return 2
    except KeyboardInterrupt:
        return 130
    except asyncio.CancelledError:  # SIGTERM, before kopf began to watch
        return 0
    return 0


def run_release(arguments: Sequence[str]) -> int:
    """The exit status of `trunkline-operator release`."""
    began = time.monotonic()  # its deadline includes the imports
    from trunkline_operator.release import configured, release

    def say(line: str) -> None:
        print(line, flush=True)  # noqa: T201  # its reader is a person

    return asyncio.run(release(configured(arguments), say, began))


def configured(arguments: Sequence[str], env: Mapping[str, str]) -> OperatorConfig:
    """What flags and environment say, or a ConfigError."""
    flags = parser().parse_args(arguments)
    token = env.get(ENV_OPERATOR_TOKEN, "")
    if not token:
        raise ConfigError(
            f"{ENV_OPERATOR_TOKEN} is not set: give operator and gateways the same long random token"
        )
    if not parse_gateways(flags.gateways):
        raise ConfigError("--gateways names no gateway: give host:port,… of their control ports")
    return OperatorConfig(
        operator_token=token,
        gateways=flags.gateways,
        worker_image=flags.worker_image,
        moshi_image=flags.moshi_image,
        namespaces=tuple(dict.fromkeys(flags.namespace)),
        routes_secret=parse_name("--routes-secret", flags.routes_secret),
        burst_secret=parse_name("--burst-secret", flags.burst_secret),
        lease=parse_name("--lease", flags.lease),
        host=flags.host,
        health_port=flags.health_port,
        default_namespace=flags.default_namespace,
        region=parse_region(flags.region),
        status_seconds=flags.status_seconds,
        ca_dir=flags.ca_dir,
        evict_idle_seconds=flags.evict_idle_seconds,
        prices=prices_of(flags.prices, env),
    )


def prices_of(file: Path | None, env: Mapping[str, str]) -> str:
    """The text of --prices, or else that of the environment."""
    if file is None:
        return env.get(ENV_PRICES, "")
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prices: {error}") from error


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="trunkline-operator",
        description="Turns VoiceAgents into pods, routes and Modal apps.",
        epilog=f"The environment holds {ENV_OPERATOR_TOKEN} and, outside a cluster, KUBECONFIG. "
        "`trunkline-operator release --help` tells how to let go of all agents.",
    )
    add = flags.add_argument
    add("--namespace", action="append", default=[], metavar="NS", help="repeatable; none means all")
    add("--gateways", required=True, metavar="HOST:PORT,…", help="control addresses of gateways")
    add("--worker-image", required=True, metavar="IMAGE", help="for agents that name none")
    add("--moshi-image", default="", metavar="IMAGE", help="likewise, for the Moshi engine")
    add("--routes-secret", default="", metavar="NS/NAME", help="keeps the routes for gateways")
    add("--burst-secret", default="", metavar="NS/NAME", help="keeps what stops Modal apps")
    add("--lease", default="", metavar="NS/NAME", help="of several operators, who has it acts")
    add("--host", default="0.0.0.0", help="address of the health port")
    add("--health-port", type=int, default=HEALTH_PORT, help="/healthz, /readyz and /metrics")
    add("--ca-dir", type=Path, metavar="DIR", help="ca.crt and ca.key: links are TLS with this CA")
    add(
        "--prices",
        type=Path,
        metavar="FILE",
        help="your prices of GPUs, as docs/autoscaling.md says",
    )
    add(
        "--region",
        default="",
        metavar="NAME",
        help="its own, of agents' warm.regions and residency",
    )
    add("--default-namespace", default="default", help="of agents that callers name without one")
    add(
        "--status-seconds",
        type=float,
        default=STATUS_SECONDS,
        help="live numbers are written into a status at most this often",
    )
    add(
        "--evict-idle-seconds",
        type=float,
        default=EVICT_IDLE_SECONDS,
        help="autoscalers of nodes may evict a pod that had no call for so long; 0: never",
    )
    return flags


if __name__ == "__main__":
    main()
