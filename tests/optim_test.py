import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_nets import config as configs
from efficient_nets import optim
from efficient_nets.errors import UserError


def rate(name, peak=0.1, epochs=10.0, per_epoch=10.0, **fields):
    section = configs.defaults().schedule
    section.update(name=name, **fields)
    schedule = optim.schedule(section, peak, epochs, per_epoch)
    return [float(schedule(jnp.asarray(step))) for step in range(round(epochs * per_epoch))]


def test_cosine_starts_at_the_peak_and_ends_at_end_value():
    rates = rate("cosine", end_value=1e-3)
    expected = [1e-3 + (0.1 - 1e-3) * (1 + np.cos(np.pi * t / 100)) / 2 for t in range(100)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)  # float32


def test_warm_up_rises_linearly_and_the_rest_takes_the_steps_that_are_left():
    rates = rate("cosine", warmup_epochs=2.0)
    np.testing.assert_allclose(rates[:20], np.arange(20) / 20 * 0.1, rtol=1e-5, atol=1e-9)
    assert rates[20] == pytest.approx(0.1)
    assert rates[60] == pytest.approx(0.05, rel=1e-5)


def test_multistep_multiplies_at_its_epochs_also_after_a_warm_up():
    rates = rate("multistep", milestones=(3, 6), factor=0.2, warmup_epochs=1.0)
    for step, expected in ((10, 0.1), (29, 0.1), (31, 0.02), (59, 0.02), (61, 0.004)):
        assert rates[step] == pytest.approx(expected, rel=1e-5)


def test_poly_of_power_one_is_a_line():
    np.testing.assert_allclose(rate("poly"), 0.1 * (1 - np.arange(100) / 100), rtol=1e-4)


def test_restarts_begin_anew_at_the_peak_with_longer_cycles():
    rates = rate("restarts", epochs=7.0, period=1.0, stretch=2.0, end_value=1e-3)
    assert [i for i in range(70) if rates[i] == pytest.approx(0.1)] == [0, 10, 30]
    assert rates[29] < 0.002


def test_constant_stays():
    assert set(rate("constant")) == {0.1}


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(name="cosin"), "schedule.name='cosin'.*did you mean 'cosine'"),
        (dict(name="multistep"), r"schedule.milestones=\(\)"),
        (dict(name="cosine", warmup_epochs=10.0), "schedule.warmup_epochs=10.0: must be below"),
        (dict(name="restarts", period=0.0), "schedule.period=0.0"),
        (dict(name="cosine", milestones=(3,)), r"schedule.milestones=\(3,\): cosine has none"),
    ],
)
def test_bad_schedules_name_the_field(fields, message):
    with pytest.raises(UserError, match=message):
        rate(**fields)


PARAMS = {"conv": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full((2,), 2.0)}}
ONES = jax.tree.map(jnp.ones_like, PARAMS)


def updated(steps=1, gradient=ONES, **fields):
    section = configs.defaults().optimizer
    section.update(learning_rate=0.5, **fields)
    transform = optim.optimizer(section, optax.constant_schedule(0.5), PARAMS)
    state, params = transform.init(PARAMS), PARAMS
    for _ in range(steps):
        updates, state = transform.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params["conv"]


def test_sgd_adds_decay_to_the_gradient_of_kernels_but_not_of_biases():
    params = updated(weight_decay=0.1, momentum=0.0)
    np.testing.assert_allclose(params["kernel"], 2 - 0.5 * (1 + 0.1 * 2), rtol=1e-6)
    np.testing.assert_allclose(params["bias"], 2 - 0.5, rtol=1e-6)


def test_nesterov_equals_its_definition():
    velocity, value = 0.0, 2.0
    for _ in range(3):
        velocity = 0.9 * velocity + 1
        value -= 0.5 * (1 + 0.9 * velocity)
    np.testing.assert_allclose(updated(3, nesterov=True)["bias"], value, rtol=1e-5)


def test_adamw_decays_outside_the_moments():
    params = updated(name="adamw", weight_decay=0.1)
    np.testing.assert_allclose(params["kernel"], 2 - 0.5 * (1 + 0.2), rtol=1e-5)
    np.testing.assert_allclose(
        updated(name="adam", weight_decay=0.1)["kernel"], 2 - 0.5, rtol=1e-5
    )  # L2 in the gradient: the first normalised step has length 1 whatever its size


def test_lamb_scales_the_step_to_the_norm_of_the_parameter():
    params = updated(name="lamb")
    np.testing.assert_allclose(params["kernel"], 2 - 0.5 * 2, rtol=1e-5)


def test_clipping_bounds_the_global_norm():
    params = updated(clip_norm=1.0, momentum=0.0)
    np.testing.assert_allclose(params["bias"], 2 - 0.5 / np.sqrt(6), rtol=1e-6)


def test_rules_set_rate_and_decay_by_path_each_field_by_the_first_rule_that_has_it():
    rules = (dict(match="kernel", learning_rate=0.1), dict(match="conv", weight_decay=0.0))
    params = updated(rules=rules, weight_decay=0.1, momentum=0.0)
    np.testing.assert_allclose(params["kernel"], 2 - 0.05, rtol=1e-6)
    np.testing.assert_allclose(params["bias"], 2 - 0.5, rtol=1e-6)


def test_of_the_ranges_pacts_alpha_alone_decays():
    ones = {"alpha": jnp.ones(1), "step": jnp.ones(1), "slopes": jnp.ones((1, 3))}
    params = {"conv": {"ranges": {"input": ones, "w": ones}, "w": {"kernel": jnp.ones(2)}}}
    section = configs.defaults().optimizer
    section.update(learning_rate=1.0, weight_decay=0.5, momentum=0.0)
    transform = optim.optimizer(section, optax.constant_schedule(1.0), params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transform.update(zeros, transform.init(params), params)
    found = updates["conv"]["ranges"]
    assert found["input"]["alpha"] == -0.5 and found["w"]["alpha"] == -0.5
    assert not any(jnp.any(found[site][x]) for site in found for x in ("step", "slopes"))


def test_a_bound_holds_what_an_update_would_take_beyond_it():
    rules = (dict(match="kernel", bound=1.75),)
    params = updated(rules=rules, momentum=0.0, gradient=jax.tree.map(lambda x: -x, ONES))
    np.testing.assert_array_equal(params["kernel"], 1.75)
    np.testing.assert_array_equal(params["bias"], 2.5)
    assert np.all(updated(rules=rules, momentum=0.0)["kernel"] == 1.5)
    with pytest.raises(UserError, match="bound must be at least 0"):
        updated(rules=(dict(match="kernel", bound=-1.0),))


def test_a_rule_that_matches_no_parameter_is_an_error():
    with pytest.raises(UserError, match="optimizer.rules: 'kernle' matches no parameter"):
        updated(rules=(dict(match="kernle", weight_decay=0.0),))


def test_accumulation_averages_the_gradients_of_its_steps():
    one = updated(momentum=0.0)
    two = updated(2, accumulate=2, momentum=0.0)
    np.testing.assert_allclose(two["kernel"], one["kernel"], rtol=1e-6)
    np.testing.assert_allclose(updated(1, accumulate=2, momentum=0.0)["kernel"], 2.0)
    assert [bool(optim.is_update(jnp.asarray(step), 2)) for step in range(4)] == [
        False,
        True,
        False,
        True,
    ]


def test_an_unknown_optimizer_is_named():
    with pytest.raises(UserError, match="optimizer.name='sgdm'.*did you mean 'sgd'"):
        updated(name="sgdm")


@pytest.mark.parametrize("fields", [dict(name="adamw"), dict(momentum=0.0)])
def test_nesterov_without_momentum_is_an_error(fields):
    with pytest.raises(UserError, match="optimizer.nesterov=True: it needs optimizer.name='sgd'"):
        updated(nesterov=True, **fields)
