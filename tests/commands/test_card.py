"""`prime-v2 card`."""

import json

from command_runs import refused


def test_card_command_names_what_is_missing(model_dir, tmp_path):
    assert "name the record of the run with --record" in refused("card", model_dir)
    assert "is not a folder" in refused("card", tmp_path / "nowhere")
    record = tmp_path / "record.json"
    content = {"name": "train", "command": "x", "commit": "y", "results": {"config": {"vocab_size": 280}}}
    record.write_text(json.dumps(content))
    assert "the record has no results.evaluation" in refused("card", model_dir, "--record", record)
    assert not (model_dir / "README.md").exists()
