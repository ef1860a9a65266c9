"""The configuration: what loads, what is refused and how, and the page that documents it."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspass import config as package
from dspass.config import KEYS, Config, ConfigError, DspassConfig, Ignored, Key, PassEntry, ZeroConfig
from dspass.config.keys import BY_PATH, BY_SPELLING
from dspass.config.page import page

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
FILES = sorted(Path(package.__file__).parent.glob("*.py"))


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSPASS_CONFIG", raising=False)


def refused(options: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Config.load(options)  # type: ignore[arg-type]
    assert "docs/config.md" in str(caught.value)
    return caught.value


def nest(path: str, value: object) -> dict:
    for name in reversed(path.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def merge(into: dict, other: dict) -> dict:
    for name, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            merge(into[name], value)
        else:
            into[name] = value
    return into


# --- the table and its page


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text() == page(), "run: python -m dspass.config > docs/config.md"


def test_every_key_has_one_row() -> None:
    lines = PAGE.read_text().splitlines()
    for key in KEYS:
        rows = [line for line in lines if line.startswith(f"| `{key.path}` |")]
        plain_section = key.kind == "section" and not key.ignored and not key.refused
        assert len(rows) == (0 if plain_section else 1), key.path


def test_the_table_is_sound() -> None:
    paths = [key.path for key in KEYS]
    assert len(set(paths)) == len(paths)
    known = set(paths)
    for key in KEYS:
        assert not key.section or key.section in known, key.path
        assert sum(map(bool, (key.field, key.ignored, key.refused))) <= 1, key.path
        assert not key.refused or key.instead, key.path
        if key.kind != "section" and not (key.field or key.ignored or key.refused):
            parent = next(other for other in KEYS if other.path == key.section)
            assert parent.ignored or parent.refused, f"{key.path} has neither an effect nor a reason"


def test_every_field_has_a_key_and_a_docstring() -> None:
    classes = [node for file in FILES for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    assert {"Config", "Key", "ZeroConfig"} <= {node.name for node in classes}
    for node in classes:
        for here, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(here, ast.AnnAssign):
                assert isinstance(after, ast.Expr), f"{node.name}.{ast.unparse(here.target)} has no docstring"
    acting = {(key.section.partition(".")[0], key.field) for key in KEYS if key.field}
    for item in dataclasses.fields(ZeroConfig):
        assert ("zero_optimization", item.name) in acting
    for item in dataclasses.fields(DspassConfig):
        assert ("dspass", item.name) in acting


def test_the_page_is_what_the_command_prints() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dspass.config"],
        cwd=PAGE.parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == PAGE.read_text()


# --- what loads


def test_nothing_leaves_the_stage_open() -> None:
    config = Config.load(None)
    assert config == Config()
    assert config.zero.stage is None
    assert config.resolve_stage(process_group=True).zero.stage == 3
    assert config.resolve_stage(process_group=False).zero.stage == 0


@pytest.mark.parametrize("options", [{}, {"zero_optimization": {}}, {"zero_optimization": None}, {"bf16": {}}])
def test_options_without_a_stage_mean_stage_0(options: dict) -> None:
    config = Config.load(options)
    assert config.zero.stage == 0
    assert config.resolve_stage(process_group=True) is config


def test_a_usual_file() -> None:
    config = Config.load(
        {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1,
            "bf16": {"enabled": True},
            "fp16": {"enabled": False, "loss_scale": 0},
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": 5e8,
                "stage3_prefetch_bucket_size": 5e7,
                "stage3_param_persistence_threshold": 0,
                "contiguous_gradients": True,
                "offload_optimizer": {"device": "none"},
                "mics_shard_size": -1,
            },
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "dspass": {"bucket_bytes": "25MB", "report": "out.html"},
        }
    )
    zero = config.zero
    assert (zero.stage, zero.reduce_bucket_size, zero.stage3_prefetch_bucket_size) == (
        3,
        500_000_000,
        50_000_000,
    )
    assert type(zero.reduce_bucket_size) is int
    assert zero.stage3_param_persistence_threshold == 0
    assert zero.mics_shard_size is None
    assert config.bf16
    assert not config.fp16
    assert type(config.gradient_clipping) is float
    assert config.dspass.bucket_bytes == 25_000_000
    assert {note.key for note in config.ignored} == {
        "fp16.loss_scale",
        "zero_optimization.contiguous_gradients",
        "optimizer",
    }
    assert config.offload_optimizer == "none"
    reasons = {note.key: note.reason for note in config.ignored}
    assert "packed by the graph" in reasons["zero_optimization.contiguous_gradients"]
    assert "training script" in reasons["optimizer"]


def test_other_spellings() -> None:
    options = {"bfloat16": {"enabled": True}, "zero_optimization": {"stage": 3, "max_live_parameters": 7}}
    config = Config.load(options)
    assert config.bf16
    assert config.zero.stage3_max_live_parameters == 7
    assert "same key" in str(refused({"bf16": {}, "bfloat16": {}}))


def test_a_key_of_another_stage_is_noted() -> None:
    config = Config.load({"zero_optimization": {"stage": 1, "stage3_max_live_parameters": 9}})
    key = "zero_optimization.stage3_max_live_parameters"
    assert config.ignored == (Ignored(key=key, value=9, reason="acts at stage 3, and the stage is 1"),)
    later = Config(zero=ZeroConfig(mics_shard_size=2)).resolve_stage(process_group=False)
    assert [note.key for note in later.ignored] == ["zero_optimization.mics_shard_size"]


def test_notes_keep_no_secret() -> None:
    (note,) = Config.load({"comet": {"enabled": True, "api_key": "k3y", "project": "p"}}).ignored
    assert note.value == {"enabled": True, "api_key": "(hidden)", "project": "p"}


def test_a_config_passes_through() -> None:
    config = Config(bf16=True)
    assert Config.load(config) is config


def test_construction_is_checked_and_frozen() -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage"):
        ZeroConfig(stage=4)
    with pytest.raises(ConfigError, match="both enabled"):
        Config(bf16=True, fp16=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().bf16 = True  # type: ignore[misc]
    with pytest.raises(TypeError):
        ZeroConfig(3)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "size"),
    [(1, 1), (2.0, 2), ("7", None), ("7B", 7), ("25 MB", 25_000_000), ("1.5KiB", 1536), ("2GiB", 2 << 30),
     ("4.1GB", 4_100_000_000), ("1.07GB", 1_070_000_000), ("4.1MB", 4_100_000), ("1.1GiB", 1_181_116_006),
     ("4.1234567891GB", 4_123_456_789), ("25mb", None), ("0.3B", None),
     ("-1MB", None), (0, None), (1.5, None), (True, None), ("0KB", None)],
)  # fmt: skip
def test_bytes(text: object, size: int | None) -> None:
    options = {"dspass": {"bucket_bytes": text}}
    if size is None:
        assert refused(options).key == "dspass.bucket_bytes"
    else:
        assert Config.load(options).dspass.bucket_bytes == size


@given(
    thousandths=st.integers(1000, 10**9),
    unit=st.sampled_from(["B", "KB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB"]),
)
def test_any_size_with_three_decimals_is_taken(thousandths: int, unit: str) -> None:
    base = 1024 if "i" in unit else 1000
    whole, part = divmod(thousandths, 1000)
    text = f"{whole}.{part:03}{unit}"
    size = thousandths * base ** " KMGT".index(unit[0] if unit != "B" else " ") // 1000
    assert DspassConfig(memory_budget=text, bucket_bytes=text) == DspassConfig(memory_budget=size, bucket_bytes=size)


def test_passes() -> None:
    written = ["my_pkg.passes:Mine", "...", {"name": "prefetch", "distance": 2}, "-bucket", "bucket"]
    config = Config.load({"dspass": {"passes": written}})
    assert config.dspass.passes == (
        PassEntry(name="my_pkg.passes:Mine"),
        PassEntry(name="..."),
        PassEntry(name="prefetch", options={"distance": 2}),
        PassEntry(name="bucket", drop=True),
        PassEntry(name="bucket"),
    )
    assert config.to_dict()["dspass"]["passes"] == written
    assert Config.load({"dspass": {"passes": []}}).dspass.passes == ()


@pytest.mark.parametrize(
    ("passes", "says"),
    [("prefetch", "is not a list"), ([3], "not the name"), ([{"distance": 2}], "has no name"),
     (["a b"], "not the name"),
     (["...", "..."], "twice"), (["-a"], 'Write ["...", "-a"]'), (["-..."], "not the name"),
     ([""], "not the name"),
     ([{"name": "...", "x": 1}], "no options"), ([{"name": "-a", "x": 1}], "no options"),
     ([{"name": "a", "x": {1, 2}}], "not JSON"), ([{"name": "a", "b c": 1}], "name of an option"),
     (["a:b:c"], "not the name")],
)  # fmt: skip
def test_wrong_passes(passes: object, says: str) -> None:
    error = refused({"dspass": {"passes": passes}})
    assert error.key.startswith("dspass.passes")
    assert says in str(error)


# --- files


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ds.json"
    path.write_text('\ufeff{"zero_optimization": {"stage": 2}}', encoding="utf-8")
    assert Config.load(path).zero.stage == 2
    assert Config.load(str(path)).zero.stage == 2
    monkeypatch.setenv("DSPASS_CONFIG", str(path))
    assert Config.load().zero.stage == 2
    assert Config.load({}).zero.stage == 0
    monkeypatch.setenv("DSPASS_CONFIG", "")
    assert Config.load().zero.stage is None
    monkeypatch.setenv("DSPASS_CONFIG", str(tmp_path / "gone.json"))
    assert "$DSPASS_CONFIG names it" in str(refused(None))


@pytest.mark.parametrize(
    ("text", "says"),
    [('{\n "a": 1,\n}', "line 3, column 1"), ("[1]", "holds a list"),
     ('{"bf16": {}, "bf16": {}}', '"bf16" is written twice'),
     ('{"gradient_clipping": NaN}', "NaN is not JSON"), ("", "line 1, column 1"),
     ("[" * 100_000, "nested too deeply"),
     ('{"gradient_clipping": 1e999}', "is not a number")],
    ids=range(7),
)  # fmt: skip
def test_malformed_files(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    assert says in str(refused(path))


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "no such file" in str(refused("ds_confg.json"))
    assert "cannot be read" in str(refused(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in str(refused(tmp_path / "binary"))
    assert "JSON text" in str(refused('{"bf16": {}}'))
    assert "a list" in str(refused([1]))
    assert "not the name of a key" in str(refused({1: 2}))


# --- what is refused


@pytest.mark.parametrize(
    ("options", "key", "says"),
    [
        (
            {"zero_optimization": {"stge": 3}},
            "zero_optimization.stge",
            "Did you mean zero_optimization.stage?",
        ),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation", "Did you mean zero_optimization?"),
        ({"stage": 3}, "stage", "Did you mean zero_optimization.stage?"),
        ({"bf16": {"gradient_clipping": 1}}, "bf16.gradient_clipping", "at the top level"),
        ({"qqqqqqqq": 3}, "qqqqqqqq", "Remove it."),
        ({"optimizer": {"typ": "Adam"}}, "optimizer.typ", "Did you mean optimizer.type?"),
        ({"zero_optimization": {"stage": "3"}}, "zero_optimization.stage", "Write 3 without quotes."),
        (
            {"zero_optimization": {"stage": True}},
            "zero_optimization.stage",
            "true (a flag) is not a whole number",
        ),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage", "from 0 to 3"),
        ({"zero_optimization": {"stage": 3.0}}, "zero_optimization.stage", "Write 3."),
        (
            {"zero_optimization": {"reduce_bucket_size": 0.5}},
            "zero_optimization.reduce_bucket_size",
            "0.5 is not",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": 0}},
            "zero_optimization.reduce_bucket_size",
            "at least 1",
        ),
        ({"zero_optimization": {"mics_shard_size": 0}}, "zero_optimization.mics_shard_size", "at least 1"),
        ({"zero_optimization": True}, "zero_optimization", '{"stage": 1}'),
        (
            {"zero_optimization": {"contiguous_gradients": 1}},
            "zero_optimization.contiguous_gradients",
            "true or false",
        ),
        ({"bf16": {"enabled": "true"}}, "bf16.enabled", "Write true without quotes."),
        ({"compile": {"offload_activation": "false"}}, "compile.offload_activation", "Write false without quotes."),
        ({"bf16": True}, "bf16", "is not a section"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16.enabled", "both enabled"),
        ({"gradient_clipping": -1}, "gradient_clipping", "at least 0"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping", "nan is not"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps", "at least 1"),
        ({"train_batch_size": "auto"}, "train_batch_size", "no trainer fills it in"),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled", '"auto" has no meaning here'),
        ({"optimizer": {"params": {"lr": "auto"}}}, "optimizer.params.lr", '"auto" has no meaning here'),
        ({"amp": {"opt": ["auto"]}}, "amp.opt[0]", '"auto" has no meaning here'),
        ({"dspass": {"report": "report.txt"}}, "dspass.report", ".html"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device",
            'is not one of "none", "cpu". Nothing is offloaded to a disk.',
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 2}}},
            "zero_optimization.offload_optimizer.ratio",
            "from 0 to 1",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param.device",
            "needs stage 3",
        ),
        ({"dspass": {"fallback_random": None}}, "dspass.fallback_random", "null is not true or false"),
    ],
)
def test_errors_name_the_key(options: dict, key: str, says: str) -> None:
    error = refused(options)
    assert error.key == key
    assert str(error).startswith(f"{key}: ")
    assert says in str(error)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"zero_optimization": {"cpu_offload": True}}, "zero_optimization.cpu_offload"),
        (
            {"zero_optimization": {"zero_quantized_nontrainable_weights": True}},
            "zero_optimization.zero_quantized_nontrainable_weights",
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size"),
        ({"amp": {"enabled": True}}, "amp.enabled"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype"),
        (
            {"compression_training": {"head_pruning": {"shared_parameters": {"enabled": True}}}},
            "compression_training.head_pruning",
        ),
        (
            {"compression_training": {"layer_reduction": {"enabled": True, "keep_number_layer": 5}}},
            "compression_training.layer_reduction",
        ),
        (
            {
                "compression_training": {
                    "activation_quantization": {"shared_parameters": {"range_calibration": "static"}}
                }
            },
            "compression_training.activation_quantization.shared_parameters.range_calibration",
        ),
        (
            {"compression_training": {"weight_quantization": {"shared_parameters": {"rounding": "stochastic"}}}},
            "compression_training.weight_quantization.shared_parameters.rounding",
        ),
        ({"sparse_attention": {"mode": "fixed"}}, "sparse_attention"),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True}},
            "activation_checkpointing.cpu_checkpointing",
        ),
        ({"compile": {"passes": ["z3"]}}, "compile.passes"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
    ],
)
def test_what_is_not_built_is_refused(options: dict, key: str) -> None:
    error = refused(options)
    assert error.key == key
    assert "this version does not do" in str(error)


def test_what_is_not_built_may_be_off() -> None:
    options = {
        "zero_optimization": {
            "offload_param": None,
            "zero_quantized_nontrainable_weights": False,
        },
        "elasticity": {"enabled": False},
        "compression_training": {"row_pruning": {"shared_parameters": {"enabled": False}, "different_groups": {}}},
        "sparse_attention": {},
    }
    assert all("not in this version" in note.reason for note in Config.load(options).ignored)
    assert len(Config.load(options).ignored) == 4


# --- what ranks compare


def test_differences() -> None:
    one = Config.load({"zero_optimization": {"stage": 3}, "optimizer": {"type": "Adam"}})
    same = Config.load({"zero_optimization": {"stage": 3, "reduce_bucket_size": None}, "dspass": {"report": "a.html"}})
    other = Config.load({"zero_optimization": {"stage": 2, "reduce_bucket_size": 10}, "bf16": {"enabled": True}})
    assert one.differences(same.to_dict()) == []
    assert one.differences(other.to_dict()) == [
        "bf16.enabled: false here, true there",
        "zero_optimization.reduce_bucket_size: unset here, 10 there",
        "zero_optimization.stage: 3 here, 2 there",
    ]


@pytest.mark.parametrize(
    ("total", "micro", "steps", "ranks", "result"),
    [(None, None, 3, 4, (None, None, 3)), (None, 2, None, 4, (8, 2, 1)), (None, 2, 3, 4, (24, 2, 3)),
     (16, 2, None, 4, (16, 2, 2)), (16, None, None, 4, (16, 4, 1)), (16, None, 2, 4, (16, 2, 2)),
     (16, 2, 2, 4, (16, 2, 2)),
     (16, 2, 2, 2,
      "16 is not 2 train_micro_batch_size_per_gpu x 2 gradient_accumulation_steps x 2 ranks = 8. Write 8,"),
     (10, 4, None, 2, "10 is not a multiple of 4 train_micro_batch_size_per_gpu x 2 ranks = 8."),
     (10, None, 3, 2, "10 is not a multiple of 3 gradient_accumulation_steps x 2 ranks = 6."),
     (2, None, None, 4, "2 is not a multiple of"), (2, 2, None, 4, "2 is not a multiple of")],
)  # fmt: skip
def test_batch(total: int | None, micro: int | None, steps: int | None, ranks: int, result: object) -> None:
    written = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    config = Config.load({name: value for name, value in written.items() if value is not None})
    assert Config.load(config.to_dict()) == config
    if isinstance(result, str):
        with pytest.raises(ConfigError) as caught:
            config.resolve_batch(ranks)
        assert caught.value.key == "train_batch_size"
        assert result in str(caught.value)
    else:
        done = config.resolve_batch(ranks)
        assert (
            done.train_batch_size,
            done.train_micro_batch_size_per_gpu,
            done.gradient_accumulation_steps,
        ) == result
        assert done.resolve_batch(ranks) == done


# --- any configuration

VALID: dict[str, st.SearchStrategy] = {
    "flag": st.booleans(),
    "integer": st.integers(1, 3),
    "count": st.integers(1, 10**12) | st.integers(1, 10**9).map(float),
    "number": st.floats(0, 1e6) | st.integers(0, 9),
    "text": st.sampled_from(["a.html", "b.json"]),
    "list": st.lists(st.integers(), max_size=2),
    "object": st.dictionaries(st.sampled_from(["x", "y"]), st.integers(), max_size=2),
    "any": st.integers(2, 5),
    "bytes": st.integers(1, 10**10) | st.sampled_from(["25MB", "1.5KiB"]),
    "budget": st.integers(1, 10**10) | st.sampled_from(["60GB", "75%", "auto"]),
    "passes": st.just(["...", "-a", {"name": "b", "x": [1]}]),
    "groups": st.dictionaries(st.sampled_from(["x", "y"]), st.just({"params": {"bits": 8}, "modules": ["a.*b"]})),
}
LEAVES = [key for key in KEYS if key.kind != "section"]


def _values(key: Key) -> st.SearchStrategy:
    if key.choices:
        # "cpu" for parameters needs a stage, which is drawn apart.
        return st.sampled_from(key.choices) if key.field != "offload_param" else st.just("none")
    if key.name in ("num_bits", "group_dim", "symmetric"):
        return st.just({"num_bits": 8, "group_dim": 1, "symmetric": True}[key.name])
    if key.name in ("modules", "exclude") and key.section == "dspass.quantise.layers":
        return st.lists(st.sampled_from(["lm_head", "*.mlp.*"]), max_size=2)
    if key.path == "dspass.quantise.block" or key.name == "group_size":
        return st.integers(1, 64).map(lambda n: 16 * n)
    if key.path == "compression_training.weight_quantization.different_groups":
        params = {"start_bits": 12, "target_bits": 4, "quantization_period": 3}
        return st.dictionaries(st.sampled_from(["x", "y"]), st.just({"params": params, "modules": ["*"]}))
    if key.section.startswith("compression_training.") and key.name == "enabled":
        return st.just(False)  # true needs groups
    if key.path == "dspass.experts.capacity_factor":
        return st.floats(0.1, 8)
    if key.path == "dspass.plan":
        return st.just("b.json")
    if key.path == "pipeline.boundaries":
        return st.lists(st.sampled_from(["h.1", "h.2"]), max_size=2)
    if key.path == "dspass.experts.expected_imbalance":
        return st.floats(1, 8)
    return st.floats(0, 1) if key.high == 1 and key.kind == "number" else VALID[key.kind]


@st.composite
def options(draw: st.DrawFn) -> tuple[dict, list[Key]]:
    keys = draw(st.lists(st.sampled_from(LEAVES), unique=True, max_size=12))
    tree: dict = {}
    for key in keys:
        if key.section == "sparse_attention" or key.path in ("fp16.enabled", "dspass.quantise.layers.activations"):
            continue  # the latter two exclude others
        if key.path in ("dspass.experts.drop_tokens", "dspass.experts.min_capacity"):
            continue  # they say nothing without the factor
        if key.section == "pipeline" and key.field and not any(other.path == "pipeline.stages" for other in keys):
            continue  # they say nothing without stages
        if key.field == "mics_shard_size" and any(other.field == "zero_hpz_partition_size" for other in keys):
            continue  # they exclude each other
        if key.refused:
            value = draw(st.sampled_from(key.off))
        elif key.name == "enabled" and not key.field:
            value = False
        else:
            value = draw(_values(key))
        merge(tree, nest(key.path, value))
    return tree, keys


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options())
def test_any_known_keys_load_and_round_trip(drawn: tuple[dict, list[Key]]) -> None:
    tree, _ = drawn
    before = json.dumps(tree)
    config = Config.load(tree)
    assert json.dumps(tree) == before
    again = Config.load(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert config.differences(again.to_dict()) == []
    # Nothing that was written disappears: it is in a field or in the notes, by itself or with its section.
    noted = {note.key for note in config.ignored}
    for key in drawn[1]:
        if key.section != "sparse_attention" and not key.field:
            assert key.path in noted or key.section in noted, key.path


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([key for key in LEAVES if not BY_PATH.get(key.section, key).open]), st.data())
def test_any_misspelt_key_is_refused_by_name(key: Key, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(key.name) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_1"))
    name = key.name[:at] + letter + key.name[at + data.draw(st.integers(0, 1)) :]
    path = f"{key.section}.{name}" if key.section else name
    if path in BY_SPELLING:
        return
    error = refused(nest(path, None))
    assert error.key == path
    assert "not a known key" in str(error)
    if len(name) > 4:
        assert "Did you mean" in str(error)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(LEAVES))
def test_auto_is_refused_by_name(key: Key) -> None:
    if "auto" in key.off:
        return
    error = refused(nest(key.path, "auto"))
    assert error.key == key.path
    assert '"auto"' in str(error)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_only_the_standard_library_is_imported(file: Path) -> None:
    tree = ast.parse(file.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = {name for name in names if not name.startswith("dspass.config.")}
    assert {name.partition(".")[0] for name in others} <= set(sys.stdlib_module_names)


def test_a_block_that_kernels_cannot_read_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"dspass.quantise.block: 250 is no multiple of 16. Write 256"):
        Config.load({"dspass": {"quantise": {"block": 250}}})
    with pytest.raises(ConfigError, match=r'dspass.quantise.weights: "int7".* is not one of "int8", "int4"'):
        Config.load({"dspass": {"quantise": {"weights": "int7"}}})


def test_quantised_keys_at_another_stage_are_noted() -> None:
    zero = {"stage": 2, "zero_quantized_weights": True, "zero_quantized_gradients": False}
    (note,) = Config.load({"zero_optimization": zero}).ignored
    assert note.key == "zero_optimization.zero_quantized_weights"
    assert "stage 3" in note.reason


@pytest.mark.parametrize(("stage", "has_no_use"), [(2, "stage3_prefetch_bucket_size"), (3, "allgather_bucket_size")])
def test_each_stage_has_one_size_of_gathers(stage: int, has_no_use: str) -> None:
    zero = {"stage": stage, "stage3_prefetch_bucket_size": 5e7, "allgather_bucket_size": 5e8}
    (note,) = Config.load({"zero_optimization": zero}).ignored
    assert note.key == f"zero_optimization.{has_no_use}"


def test_error_feedback_where_it_has_no_use_is_noted() -> None:
    loco = {"err_beta": 0.8, "reset_T": 1024}

    def noted(zero: dict, **quantise: object) -> dict[str, str]:
        config = Config.load(
            {"zero_optimization": {"zeropp_loco_param": loco, **zero}, "dspass": {"quantise": quantise}}
        )
        return {note.key.rpartition(".")[2]: note.reason for note in config.ignored}

    on = {"stage": 3, "zero_quantized_gradients": True}
    assert noted(on) == noted(on, error_feedback=True) == noted({"stage": 3}, gradients="int8") == {}
    assert set(noted({"stage": 3}, error_feedback=True)) == {"err_beta", "reset_T", "error_feedback"}
    assert "zero_quantized_gradients" in noted({"stage": 3})["err_beta"]
    assert "dspass.quantise.error_feedback is false" in noted(on, error_feedback=False)["reset_T"]
    assert "stage 3" in noted({"stage": 2}, error_feedback=True)["error_feedback"]
    with pytest.raises(ConfigError, match=r"zeropp_loco_param.reset_T: 0 is not a whole number of at least 1"):
        Config.load({"zero_optimization": {"zeropp_loco_param": {"err_beta": 0.8, "reset_T": 0}}})


def test_either_key_switches_error_feedback_on_and_ours_off() -> None:
    def feeds(loco: dict | None, flag: bool | None) -> bool:
        zero = {"stage": 3, "zero_quantized_gradients": True, "zeropp_loco_param": loco}
        return Config.load(
            {"zero_optimization": zero, "dspass": {"quantise": {"error_feedback": flag}}}
        ).feeds_errors_back

    assert [feeds(None, None), feeds({}, None), feeds({"err_beta": 0.0}, None), feeds(None, True)] == [
        False,
        False,
        True,
        True,
    ]
    assert not feeds({"err_beta": 0.8}, False)


def test_quantisation_aware_training_as_deepspeed_says_it() -> None:
    shared = {
        "enabled": True, "quantizer_kernel": True, "schedule_offset": 50, "quantize_groups": 1, "quantize_verbose": True,
        "quantization_type": "asymmetric", "rounding": "nearest", "quantize_weight_in_forward": False,
        "fp16_mixed_quantize": {"enabled": False, "quantize_change_ratio": 0.001},
    }  # fmt: skip
    weights = {"params": {"start_bits": 12, "target_bits": 4}, "modules": ["attention.self", "embeddings"]}
    inputs = {"shared_parameters": {"enabled": True}, "different_groups": {"aq1": {"params": {"bits": 8}}}}
    section = {"weight_quantization": {"shared_parameters": shared, "different_groups": {"wq1": weights}}}
    config = Config.load({"compression_training": section | {"activation_quantization": inputs}})
    (group,) = config.rounded_weights.groups or ()
    assert (group.name, group.start_bits, group.target_bits, group.period) == ("wq1", 12, 4, 1)
    assert group.modules == ("attention.self", "embeddings")
    assert (config.rounded_weights.schedule_offset, config.rounded_weights.quantize_groups) == (50, 1)
    (other,) = config.rounded_activations.groups or ()
    assert (other.start_bits, other.target_bits, other.modules) == (8, 8, ("*",))
    assert config.rounded_activations.schedule_offset == 1000
    assert config.trains_rounded
    assert Config.load(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("group", "key", "says"),
    [
        (3, "g", "is not a group of layers"),
        ({"modules": ["a"]}, "g.params", 'Write {"params": {"start_bits": 8'),
        ({"params": {"start_bits": 8}}, "g.params.target_bits", "is not written"),
        ({"params": {"start_bits": 17, "target_bits": 8}}, "g.params.start_bits", "from 2 to 16"),
        ({"params": {"start_bits": 8, "target_bits": 1}}, "g.params.target_bits", "from 2 to 16"),
        ({"params": {"start_bits": 4, "target_bits": 8}}, "g.params.start_bits", "4 bits cannot fall to 8. Write 8"),
        ({"params": {"start_bit": 4}}, "g.params.start_bit", "g.params.start_bits?"),
        (
            {"params": {"start_bits": 8, "target_bits": 8, "quantization_period": 0}},
            "g.params.quantization_period",
            "1",
        ),
        ({"params": {"start_bits": 8, "target_bits": 8}, "modules": "*"}, "g.modules", 'Write ["*"]'),
        (
            {"params": {"start_bits": 8, "target_bits": 8}, "modules": ["*.mlp"]},
            "g.modules",
            "not a regular expression",
        ),
        ({"params": {"start_bits": 8, "target_bits": 8}, "related_modules": [["a"]]}, "g.related_modules", "pruning"),
    ],
)
def test_wrong_groups_of_layers(group: object, key: str, says: str) -> None:
    error = refused({"compression_training": {"weight_quantization": {"different_groups": {"g": group}}}})
    assert error.key == f"compression_training.weight_quantization.different_groups.{key}"
    assert says in str(error)


def test_what_is_trained_rounded_is_not_stored_in_few_bits_at_once() -> None:
    group = {"g": {"params": {"start_bits": 8, "target_bits": 8}}}
    section = {"weight_quantization": {"shared_parameters": {"enabled": True}, "different_groups": group}}
    error = refused({"compression_training": section, "dspass": {"quantise": {"layers": {"format": "int8"}}}})
    assert "call dspass.quantise(model)" in str(error)
    missing = {"weight_quantization": {"shared_parameters": {"enabled": True}}}
    assert "no group of layers is there" in str(refused({"compression_training": missing}))


def test_pipelines() -> None:
    config = Config.load({"pipeline": {"stages": 4, "micro_batches": 16, "schedule": "Interleaved1F1B"}})
    assert (config.pipeline.stages, config.pipeline.micro_batches, config.pipeline.schedule) == (
        4,
        16,
        "interleaved1f1b",
    )
    assert config.engine_stage == 1
    for off in ("auto", 1, None):
        assert not Config.load({"pipeline": {"stages": off}}).pipeline.enabled
    assert Config.load({"pipeline": {"stages": 2, "micro_batches": "auto"}}).pipeline.micro_batches is None
    for options, key in [
        ({"stages": True}, "stages"),
        ({"stages": 2, "schedule": "2f1b"}, "schedule"),
        ({"stages": 2, "boundaries": [1]}, "boundaries"),
        ({"micro_batches": 4}, "micro_batches"),
        ({"stages": 2, "micro_batches": 0}, "micro_batches"),
    ]:
        assert refused({"pipeline": options}).key == f"pipeline.{key}"
