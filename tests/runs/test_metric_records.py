"""metrics.json: records of this version and of 0.1."""

import json

from diffusion_jax.evaluation import __main__ as command
from diffusion_jax.runs.metric_records import add_record, read_records

OLD = [
    {"samples_sha256": "a", "memorisation": {"close_share": 0.25, "picture": "memorisation.png"}},
    {"samples_sha256": "b", "evaluation": {"metrics": ["fid", "memorisation"]}, "frechet_distance": 12.5},
]


def test_records_of_version_0_1_are_translated(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(OLD))
    first, second = read_records(path)
    assert first == {"samples_sha256": "a", "memorization": {"close_share": 0.25, "picture": "memorisation.png"}}
    assert second["evaluation"] == {"metrics": ["fid", "memorization"]} and second["frechet_distance"] == 12.5


def test_the_table_shows_memorization_of_version_0_1(tmp_path, capsys):
    (tmp_path / "metrics.json").write_text(json.dumps(OLD))
    command.main(["table", str(tmp_path)])
    header, _, row, _ = capsys.readouterr().out.splitlines()
    cells = dict(zip(*([cell.strip() for cell in line.split("|")[1:-1]] for line in (header, row)), strict=True))
    assert cells["close_share"] == "0.25"


def test_a_new_record_replaces_the_old_spelling(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(OLD))
    add_record(path, {"samples_sha256": "a", "memorization": {"close_share": 0.5}})
    assert "memorisation" not in json.loads(path.read_text())[-1]
    assert [record["memorization"] for record in read_records(path) if "memorization" in record] == [
        {"close_share": 0.5}
    ]
