"""Forms of the precision axis, and what every wrong one says."""

import re

import pytest

from efficient_nets.errors import UserError
from efficient_nets.ops import precision, quantizers

pytestmark = pytest.mark.every_case


def test_float_rounds_nothing():
    for given in ("float", {}, {"kernel": None}, precision.FLOAT):
        assert precision.parse(given) == precision.FLOAT
    assert precision.FLOAT.quantizers == {} and str(precision.FLOAT) == "float"


@pytest.mark.parametrize(
    "short, long",
    [
        ("lsq:w4a2", dict(kernel=dict(method="lsq", bits=4), input=dict(method="lsq", bits=2))),
        ("lsq:w3La8", dict(kernel=dict(method="lsq", levels=3), input=dict(method="lsq", bits=8))),
        (
            "lsq:w4a4s",
            dict(kernel=dict(method="lsq", bits=4), input=dict(method="lsq", bits=4, signed=True)),
        ),
        (
            "w=twn,a=minmax:5Ls",
            dict(kernel=dict(method="twn"), input=dict(method="minmax", levels=5, signed=True)),
        ),
        ("lsq:c4", dict(core=dict(method="lsq", bits=4))),
        ("c=xnor,a=pact:2", dict(core=dict(method="xnor"), input=dict(method="pact", bits=2))),
        ("lsq+:o4", dict(output=dict(method="lsq+", levels=16))),
        ("dorefa:w1a2g6", dict.fromkeys(("kernel", "input", "gradient"), "dorefa") | {}),
        ("xnor", dict(kernel=dict(method="xnor"), input=dict(method="xnor"))),
        ("sign", dict(kernel=dict(method="sign"), input=dict(method="sign"))),
        ("twn", dict(kernel=dict(method="twn"))),
        (
            "w=lq:2,a=pact:3",
            dict(kernel=dict(method="lq", bits=2), input=dict(method="pact", bits=3)),
        ),
        (
            "ternarize/clipped",
            dict.fromkeys(("kernel", "input"), dict(method="ternarize", gradient="clipped")),
        ),
        (
            "w=ternarize,a=kbit/clipped:4",
            dict(
                kernel=dict(method="ternarize"),
                input=dict(method="kbit", bits=4, gradient="clipped"),
            ),
        ),
        (
            "w=ttq,o=minmax:5L",
            dict(kernel=dict(method="ttq"), output=dict(method="minmax", levels=5)),
        ),
    ],
)
def test_short_forms_are_long_forms(short, long):
    if "dorefa" in long.values():
        bits = dict(kernel=1, input=2, gradient=6)
        long = {site: dict(method=method, bits=bits[site]) for site, method in long.items()}
    found = precision.parse(short)
    assert found == precision.parse(long)
    assert hash(found) == hash(precision.parse(long))
    assert list(found.quantizers) == [
        site for site in ("kernel", "input", "output", "gradient", "core") if site in long
    ]
    assert precision.parse(found) is found


def test_long_forms_take_every_field():
    fields = dict(
        method="lsq",
        stages=[[0, 16], [2.5, 8]],
        levels=8,
        signed=False,
        per="groups:2",
        axis="in",
        gradient="scaled",
        step_gradient="none",
        power_of_two=True,
        normalise="restored",
        post_scale=True,
        loss=0.5,
        loss_norm="l1",
        float_epochs=1,
        freeze_epoch=9.5,
        stop_epoch=20,
    )
    made = precision.parse(dict(kernel=fields)).kernel
    for name, value in fields.items():
        assert getattr(made, name) == (((0, 16), (2.5, 8)) if name == "stages" else value)
    assert made.bits == 3 and made.scheduled and hash(made) == hash(made)
    assert precision.parse({"kernel": made}).kernel is made
    pact = quantizers.make("input", dict(method="pact", bits=4, alpha=6, pad="before"))
    assert (pact.option("alpha"), pact.pad, pact.signed, pact.scheduled) == (
        6,
        "before",
        False,
        False,
    )
    sized = quantizers.make("kernel", dict(method="xnor++", case=3, size=[4, 5]))
    assert sized.option("size") == (4, 5) and hash(sized) == hash(sized)


@pytest.mark.parametrize("method", quantizers.METHODS)
def test_texts_are_read_back(method):
    """A text gives what it was made of, or says with its dots that there is more."""
    for site, entry in quantizers.METHODS[method].items():
        for levels in filter(entry.levels, (2, 3, 4, 16, 256)):
            made = precision.parse({site: dict(method=method, levels=levels)})
            assert precision.parse(str(made)) == made
            assert not str(made).endswith("...")
            if site != "gradient":
                more = precision.parse({site: dict(method=method, levels=levels, post_scale=True)})
                assert str(more) == f"{made}..."


@pytest.mark.parametrize(
    "given, text",
    [
        ("lsq:w4a4o4", "lsq:w4a4o4"),
        ("dorefa:w4a4g8", "dorefa:w4a4g8"),
        ("w=lsq:3L,a=lsq:8", "lsq:w3La8"),
        ("a=pact:2,w=lq:2", "w=lq:2,a=pact:2"),
        ("xnor", "xnor:w1a1"),
        ("c=lsq:4,a=pact:2", "a=pact:2,c=lsq:4"),
        (dict(core=dict(method="xnor", per="channel")), "xnor:c1..."),
        ("lsq:w04", "lsq:w4"),
        ("lsq:w16L", "lsq:w4"),
        ("ternarize/clipped", "ternarize/clipped:w3La3L"),
        ("ternarize/identity", "ternarize:w3La3L"),
        ("minmax:w4i4", "minmax:w4i4"),
        (dict(kernel=dict(method="lsq", bits=4, per="channel")), "lsq:w4..."),
    ],
)
def test_texts(given, text):
    assert str(precision.parse(given)) == text


@pytest.mark.parametrize(
    "given, words",
    [
        (None, "precision=None: give 'float', a text such as 'lsq:w4a4', or a mapping"),
        (4, "precision=4: give 'float'"),
        ("lqs:w4", "precision='lqs' is not known: allowed .*did you mean 'lq"),
        ("", "precision='' is not known"),
        ("lsq", "precision='lsq': give bits, as in 'lsq:w4a4'"),
        ("lsq:4", "precision='lsq:4': after the colon give letters of w, a, o, g"),
        ("lsq:w4x4", "after the colon"),
        ("lsq:W4", "after the colon"),
        ("lsq:w4a", "after the colon"),
        ("lsq:w4w8", "precision='lsq:w4w8': a site is given twice"),
        ("w=lq:2,w=lq:4", "precision='w=lq:2,w=lq:4': a site is given twice"),
        ("w=lq:2,", "precision='w=lq:2,': '' is not understood"),
        ("x=lq:2", "'x=lq:2' is not understood; a site is as in 'w=lq:2'"),
        ("w=lq:2a", "'w=lq:2a' is not understood"),
        ("w=lqq:2", "precision.kernel.method='lqq' is not known: .*did you mean 'lq'"),
        ("w=lq", "precision.kernel.method='lq': give bits or levels"),
        ("kbit/cliped:w4", "precision.kernel.gradient='cliped' is not known: .*'clipped'"),
        ("float:w4", "precision.kernel.method='float' is not known"),
        ("lsq:g4", "precision.gradient.method='lsq': it is only for input, kernel, output"),
        ("twn:a3L", "precision.input.method='twn': it is only for kernel"),
        (dict(krenel={}), "precision has no field 'krenel': .*did you mean 'kernel'"),
        (dict(kernel="lsq:4"), "precision.kernel='lsq:4': give a mapping with 'method'"),
        (dict(kernel=dict(bits=4)), "precision.kernel has no 'method': allowed binarize, "),
    ],
)
def test_wrong_forms(given, words):
    with pytest.raises(UserError, match=re.escape(words).replace(r"\.\*", ".*")):
        precision.parse(given)


def test_a_quantizer_of_another_site():
    with pytest.raises(UserError, match="precision.kernel: the quantizer is one for 'input'"):
        precision.parse(dict(kernel=quantizers.make("input", dict(method="sign"))))
    with pytest.raises(UserError, match="precision's site='weights' is not known"):
        quantizers.make("weights", dict(method="sign"))


KERNEL = dict(site="kernel", method="lsq", bits=4)
INPUT = dict(site="input", method="lsq", bits=4)
CORE = dict(site="core", method="lsq", bits=4)
XNOR = dict(site="kernel", method="xnor++")


@pytest.mark.parametrize(
    "fields, words",
    [
        (KERNEL | dict(levels=16), ": give one of bits and levels"),
        (KERNEL | dict(bits=0), ".bits=0: allowed 1 to 8"),
        (KERNEL | dict(bits=9), ".bits=9: allowed 1 to 8"),
        (KERNEL | dict(bits=4.0), ".bits=4.0: allowed 1 to 8"),
        (KERNEL | dict(bits=True), ".bits=True: allowed 1 to 8"),
        (dict(site="kernel", method="lsq", levels=257), ".levels=257: allowed 2 to 256"),
        (dict(site="kernel", method="lsq", levels=1), ".levels=1: allowed 2 to 256"),
        (dict(site="kernel", method="lsq", levels="4"), ".levels='4': allowed 2 to 256"),
        (dict(site="kernel", method="lsq"), ".method='lsq': give bits or levels"),
        (dict(site="kernel", method="twn", bits=2), ".levels=4: allowed for 'twn' there: 3"),
        (dict(site="kernel", method="log2", bits=1), "allowed for 'log2' there: 4, 8, 16, 32, 64"),
        (dict(site="kernel", method="kbit", levels=5), "there: 4, 6, 8, 10, 12, 14, 16, 18, ..."),
        (dict(site="kernel", method="sign", bits=2), ".levels=4: allowed for 'sign' there: 2"),
        (dict(site="kernel", method="fatnn", bits=4), "allowed for 'fatnn' there: 3, 4"),
        (KERNEL | dict(method=["lsq"]), ".method=['lsq'] is not known"),
        (KERNEL | dict(bit=4), " has no field 'bit': allowed bits, .*did you mean 'bits'"),
        # Fields that would do nothing there.
        (KERNEL | dict(pad="before"), ".pad: 'lsq' does not heed it at this site"),
        (KERNEL | dict(zero_point=True), ".zero_point: 'lsq' does not heed it"),
        (dict(site="output", method="lsq", bits=2, normalise="mean"), ".normalise: 'lsq' does not"),
        (INPUT | dict(axis="in"), ".axis: 'lsq' does not heed it"),
        (KERNEL | dict(axis="in"), ".axis='in': with per='layer'"),
        (CORE | dict(axis="in", per="channel"), ".axis: 'lsq' does not heed it"),
        (CORE | dict(per="tap"), ".per='tap' is not known"),
        (CORE | dict(normalise="mean"), ".normalise='mean' is not known: allowed none, restored"),
        (dict(site="core", method="xnor++"), ".method='xnor++': it scales a map's output, which"),
        (dict(site="core", method="quantized_relu"), "it is only for input, output"),
        (dict(site="output", method="lsq", bits=2, loss=1.0), ".loss: 'lsq' does not heed it"),
        (INPUT | dict(loss_norm="l1"), ".loss_norm='l1': it takes a loss above 0"),
        (dict(site="kernel", method="sign", per="channel"), ".per: 'sign' does not heed it"),
        (dict(site="kernel", method="sign", freeze_epoch=1.0), ".freeze_epoch: 'sign' does not"),
        (dict(site="kernel", method="kbit", bits=2, stages=()), ".stages: 'kbit' does not heed"),
        (dict(site="gradient", method="dorefa", bits=2, loss=1.0), ".loss: 'dorefa' does not"),
        (KERNEL | dict(clip=1.0), " has no field 'clip'"),
        # Names and numbers.
        (KERNEL | dict(gradient="triangle"), ".gradient (of 16 levels)='triangle' is not known"),
        (KERNEL | dict(bits=1, gradient="hat"), ".gradient='hat' is not known: .*swish, triangle"),
        (
            dict(site="kernel", method="twn", gradient="clipped"),
            ".gradient='clipped' is not known: allowed identity",
        ),
        (KERNEL | dict(step_gradient="1/n"), ".step_gradient='1/n' is not known"),
        (KERNEL | dict(normalise="mean"), ".normalise='mean' is not known: allowed none, restored"),
        (INPUT | dict(normalise="standard"), "='standard' is not known: allowed mean, none, var"),
        (INPUT | dict(normalise="restored"), "='restored' is not known: allowed mean, none, var"),
        (KERNEL | dict(axis="both"), ".axis='both' is not known: allowed in, out"),
        (INPUT | dict(pad="never"), ".pad='never' is not known: allowed after, before"),
        (KERNEL | dict(loss=1.0, loss_norm="l3"), ".loss_norm='l3' is not known: allowed l1, l2"),
        (KERNEL | dict(method="dorefa", signed=False), ".signed=False: 'dorefa' has no such form"),
        (KERNEL | dict(signed=None), ".signed=None: allowed True, False"),
        (KERNEL | dict(power_of_two="no"), ".power_of_two='no': allowed True, False"),
        (KERNEL | dict(post_scale=1), ".post_scale=1: allowed True, False"),
        (KERNEL | dict(per="filter"), ".per='filter' is not known: allowed channel, groups:n"),
        (KERNEL | dict(per="channel:2"), ".per='channel:2' is not known"),
        (KERNEL | dict(per="groups"), ".per='groups': give a number, as in 'groups:4'"),
        (KERNEL | dict(per="size:0"), ".per='size:0': give a number, as in 'size:4'"),
        (KERNEL | dict(per="groups:\u00b2"), "give a number, as in 'groups:4'"),
        (KERNEL | dict(per=4), ".per=4: give a text, such as 'channel' or 'groups:4'"),
        (KERNEL | dict(loss=-1.0), ".loss=-1.0: give a number, at least 0"),
        (KERNEL | dict(loss="much"), ".loss='much': give a number, at least 0"),
        (KERNEL | dict(float_epochs=float("nan")), ".float_epochs=nan: give a number"),
        (KERNEL | dict(freeze_epoch=float("inf")), ".freeze_epoch=inf: give a number"),
        (KERNEL | dict(stop_epoch=-1), ".stop_epoch=-1: give a number, at least 0"),
        (
            KERNEL | dict(stop_epoch=2.0, float_epochs=2),
            ".stop_epoch=2.0: give an epoch above 2, of float_epochs, or 0",
        ),
        (
            KERNEL | dict(freeze_epoch=1.5, float_epochs=2),
            ".freeze_epoch=1.5: give 0, or an epoch not below 2, of float_epochs",
        ),
        (KERNEL | dict(stop_epoch=2, freeze_epoch=2.5), "above 2.5, of freeze_epoch, or 0"),
        (KERNEL | dict(stop_epoch=2, stages=((0, 32), (3, 16))), "above 3, of stages, or 0"),
        (
            dict(site="gradient", method="dorefa", bits=2, stop_epoch=1),
            ".stop_epoch: 'dorefa' does",
        ),
        (
            dict(site="kernel", method="minmax", bits=4, zero_point=True),
            ".zero_point: it takes signed=False and more than 2 levels",
        ),
        # Stages.
        (KERNEL | dict(stages=16), ".stages=16: give pairs (epoch, levels)"),
        (KERNEL | dict(stages=(0, 16)), ".stages=(0, 16): give pairs (epoch, levels)"),
        (KERNEL | dict(stages=((0, 16, 2),)), "give pairs (epoch, levels)"),
        (KERNEL | dict(stages=((0, 16.0),)), "give pairs (epoch, levels)"),
        (KERNEL | dict(stages=((1, 32), (2, 16))), ": epochs must rise, from 0"),
        (KERNEL | dict(stages=((0, 64), (2, 32), (2, 16))), ": epochs must rise, from 0"),
        (KERNEL | dict(stages=((0, 16), (2, 8))), "the last must have levels=16"),
        (KERNEL | dict(stages=((0, 300), (2, 16))), "each of them 3 to 256"),
        (KERNEL | dict(stages=((0, 2), (2, 16))), "each of them 3 to 256"),
        # Options of a method.
        (dict(site="input", method="xnor", k="box3"), ".k='box3': allowed 'none', 'channel', "),
        (dict(site="kernel", method="xnor++", case=5), ".case=5: allowed 1, 2, 3, 4"),
        (dict(site="kernel", method="xnor++", case=True), ".case=True: allowed 1, 2, 3, 4"),
        (dict(site="kernel", method="xnor++", size=4), ".size=4: allowed whole numbers above 0"),
        (dict(site="kernel", method="xnor++", size=(4, 0)), ".size=(4, 0): allowed whole"),
        (XNOR | dict(case=4), ".size=(): allowed for case=4: one of the map's output"),
        (XNOR | dict(case=2), ".size=(): allowed for case=2: one of the map's output"),
        (XNOR | dict(size=[3, 3]), ".size=(3, 3): allowed for case=1: (), as no factor depends"),
        (INPUT | dict(method="pact", alpha=-1), ".alpha=-1: allowed a number of at least 0"),
        (INPUT | dict(method="dorefa", clip="1"), ".clip='1': allowed a number above 0"),
        (
            INPUT | dict(method="minmax", momentum=2),
            ".momentum=2: allowed a number above 0, up to 1",
        ),
        (INPUT | dict(method="lq", keep=-0.1), ".keep=-0.1: allowed a number above 0, up to 1"),
        (dict(site="kernel", method="ttq", threshold=None), ".threshold=None: allowed a number"),
    ],
)
def test_wrong_fields(fields, words):
    fields = dict(fields)
    site = fields.pop("site")
    with pytest.raises(UserError, match=re.escape(words).replace(r"\.\*", ".*")) as error:
        quantizers.make(site, fields)
    assert str(error.value).startswith(f"precision.{site}")
