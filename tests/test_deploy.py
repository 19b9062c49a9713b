"""Units and containers run commands that there are, where the example's configuration says."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from lpgan_jax.cli import _parser
from lpgan_jax.cluster.settings import load_cluster
from lpgan_jax.training import config

DEPLOY = Path(__file__).parent.parent / "configs" / "deploy"
CLUSTER = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
ROLES = ["s1", "s2", "ds", "sp"]
PLACE = "/etc/lpgan"


def unit():
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read(DEPLOY / "lpgan@.service")
    return parser["Service"]


def of_unit(role):
    """The command as systemd splits it."""
    name, _, words = (DEPLOY / f"{role}.env").read_text().strip().partition("=")
    program, *rest = unit()["ExecStart"].split()
    assert Path(program).name == "lpgan"
    return [word for part in rest for word in (words.split() if part == f"${name}" else [part])]


def of_container(role):
    return COMPOSE["services"][role]["command"]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("command", [of_unit, of_container])
def test_a_role_is_started_by_a_command_that_there_is(command, role):
    args = _parser().parse_args(command(role))
    assert getattr(args, "server", args.command) == role
    assert args.config == f"{PLACE}/cluster.yaml"
    if role == "ds":
        assert config.load(args.train).data.path is None  # needs no data of somebody's
    if role == "sp":
        assert Path(args.out).is_relative_to(CLUSTER["state"])


def test_a_unit_may_write_the_state_and_nothing_else():
    service = unit()
    assert service["EnvironmentFile"] == f"{PLACE}/%i.env"
    assert f"/var/lib/{service['StateDirectory']}" == CLUSTER["state"]
    assert service["Environment"] == f"XDG_CACHE_HOME=/var/cache/{service['CacheDirectory']}"
    assert service["ProtectSystem"] == "strict"
    assert service["UMask"] == "0077"


def test_a_container_has_its_own_files_and_no_other_roles():
    certificates = f"{PLACE}/{CLUSTER['certificates']}"
    assert set(COMPOSE["services"]) == set(ROLES)
    for role, service in COMPOSE["services"].items():
        names = {"ca.pem", f"{role}.pem", f"{role}.key"}
        mounted = {secret["target"]: secret["source"] for secret in service["secrets"]}
        assert mounted == {f"{certificates}/{name}": name for name in names}
        assert service["volumes"] == [f"{role}:{CLUSTER['state']}"]
        (cluster,) = service["configs"]
        assert cluster["target"] == f"{PLACE}/cluster.yaml"
        assert service["read_only"]
        assert "ports" not in service
    for name, secret in COMPOSE["secrets"].items():
        assert secret["file"] == f"certificates/{name}"
    assert COMPOSE["configs"]["cluster"]["file"] == "cluster.yaml"


def test_containers_listen_where_the_configuration_says():
    on_the_line = {role for role in ROLES if "line" in COMPOSE["services"][role]["networks"]}
    assert on_the_line == {"s1", "s2"}
    assert CLUSTER["line"]["host"] in COMPOSE["services"]["s1"]["networks"]["line"]["aliases"]
    ports = {name: [str(where["port"])] for name, where in CLUSTER["servers"].items()}
    ports["s1"].append(str(CLUSTER["line"]["port"]))
    for role in ROLES:
        service = COMPOSE["services"][role]
        assert "front" in service["networks"]
        assert service.get("expose", []) == ports.get(role, [])
    for name, where in CLUSTER["servers"].items():
        assert where["host"] == name  # as Docker calls the service


def test_operators_are_told_the_ports():
    page = (DEPLOY.parent.parent / "docs" / "operators.md").read_text()
    (first, second), line = CLUSTER["servers"].values(), CLUSTER["line"]
    told = [("S1", first["port"]), ("S1", line["port"]), ("S2", second["port"])]
    found = re.findall(r"^\| (S[12]) \| (\d+) \|", page, re.MULTILINE)
    assert [(server, int(port)) for server, port in found] == told


def test_the_image_is_made_of_files_that_there_are():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    sources = [name for names in copied for name in names if not names[0].startswith("--from")]
    assert {"lpgan_jax", "configs", "constraints.txt"} <= set(sources)
    for name in sources:
        assert (DEPLOY.parent.parent / name).exists(), name
    build = COMPOSE["services"]["s1"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert f"ENV XDG_CACHE_HOME={CLUSTER['state']}/cache" in lines


def test_the_configuration_is_one():
    cluster = load_cluster(DEPLOY / "cluster.yaml")
    assert cluster.state == CLUSTER["state"]
    assert cluster.roles == ["ds", "s1", "s2", "sp"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_takes_the_unit(tmp_path):
    text = (DEPLOY / "lpgan@.service").read_text()
    file = tmp_path / "lpgan@s1.service"
    file.write_text(text.replace("/opt/lpgan/bin/lpgan", shutil.which("true")))  # must be there
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", file], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
