import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from efficient_nets import sharding
from efficient_nets.errors import UserError

STATE = {
    "conv": {
        "kernel": jax.ShapeDtypeStruct((3, 3, 4, 16), jnp.float32),
        "bias": jax.ShapeDtypeStruct((16,), jnp.float32),
    },
    "odd": {"kernel": jax.ShapeDtypeStruct((3, 5), jnp.float32)},
}
ONE = jax.ShapeDtypeStruct((16,), jnp.float32)


def specs(fsdp, rules):
    return specs_of(STATE, fsdp, rules)


def specs_of(state, fsdp, rules):
    found = sharding.state_shardings(state, STATE, rules, sharding.make_mesh(fsdp))
    return jax.tree.map(lambda place: place.spec, found)


def test_matching_leaves_are_cut_along_their_largest_axis_that_fits():
    found = specs(4, [dict(match="kernel", shard="fsdp")])
    assert found["conv"]["kernel"] == P(None, None, None, "fsdp")
    assert found["conv"]["bias"] == P()
    assert found["odd"]["kernel"] == P()  # 4 divides neither 3 nor 5


def test_the_first_rule_wins_and_one_device_needs_no_cut():
    rules = [dict(match="conv", shard="replicate"), dict(match="", shard="fsdp")]
    assert specs(4, rules)["conv"]["kernel"] == P()
    assert specs(1, [dict(match="", shard="fsdp")])["conv"]["kernel"] == P()


def test_rules_match_parameter_paths_and_hold_for_all_that_is_kept_of_them():
    state = {"params": STATE, "optimizer": [{"trace": STATE}], "stats": {"conv": {"mean": ONE}}}
    found = specs_of(state, 4, [dict(match="^conv/", shard="fsdp")])
    assert found["params"]["conv"]["bias"] == P("fsdp")
    assert found["params"] == found["optimizer"][0]["trace"]
    assert found["stats"]["conv"]["mean"] == P()


def test_a_rule_that_matches_no_parameter_is_named_but_for_the_default():
    for pattern in ("kernle", "params/"):
        message = f"sharding.rules: '{pattern}' matches no parameter: conv/bias, conv/kernel"
        with pytest.raises(UserError, match=message):
            specs(4, [dict(match=pattern, shard="fsdp")])
    mesh = sharding.make_mesh()
    assert sharding.state_shardings({"w": ONE}, {"w": ONE}, sharding.DEFAULT_RULES, mesh)


@pytest.mark.parametrize("rule", [dict(match="x", shard="fdsp"), dict(match="x", axis="fsdp")])
def test_bad_rules_are_named(rule):
    with pytest.raises(UserError, match="sharding.rules"):
        specs(4, [rule])


def test_fsdp_must_divide_the_devices():
    with pytest.raises(UserError, match="sharding.fsdp=3: must divide the number of devices, 8"):
        sharding.make_mesh(3)


def test_a_batch_that_the_devices_cannot_divide_names_the_nearest():
    with pytest.raises(UserError, match="train.batch_size=100: 8 devices.*96, 104"):
        sharding.check_batch("train.batch_size", 100, sharding.make_mesh())


@pytest.mark.parametrize("fsdp", [1, 2])
def test_batches_are_cut_over_all_devices_and_keep_their_order(fsdp):
    mesh = sharding.make_mesh(fsdp)
    rows = {"index": np.arange(32, dtype=np.int32)}
    placed = sharding.put_batch(rows, mesh)["index"]
    assert placed.addressable_shards[0].data.shape == (4,)
    np.testing.assert_array_equal(placed, rows["index"])
    stacked = sharding.put_batch({"index": rows["index"].reshape(2, 16)}, mesh, stacked=True)
    assert stacked["index"].addressable_shards[0].data.shape == (2, 2)


def test_fetch_brings_cut_arrays_back_whole():
    mesh = sharding.make_mesh(8)
    place = jax.sharding.NamedSharding(mesh, P("fsdp"))
    values = np.arange(16, dtype=np.float32)
    np.testing.assert_array_equal(sharding.fetch({"x": jax.device_put(values, place)})["x"], values)
