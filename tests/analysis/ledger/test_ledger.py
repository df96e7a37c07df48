"""The ledger over real runs: declare, test, replicate, amend; what counts as seen; what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import nbdyn
from nbdyn.analysis.ledger import Hypothesis, Ledger, looks, trial
from nbdyn.errors import Incompatible, NbdynError, NotRecorded, QueryError, UnknownName
from nbdyn.settings import options
from tests.analysis.ledger.conftest import Give, record

BODY = "It learns.\nmeasure: mean(loss) during epoch 1\ntest: < 2, t over runs"


def losses(folder: Path, *names: str, epoch: int = 1) -> np.ndarray:
    """What the measure is, computed from the frames."""
    return np.array([nbdyn.open(folder / name).steps.query(f"epoch == {epoch}")["loss"].mean() for name in names])


def ask(folder: Path, name: str, statement: str = "show loss") -> None:
    nbdyn.open(folder / name).query(statement)


def again(folder: Path, times: int = 2, body: str = BODY, name: str = "learns", **more: Any) -> Hypothesis:
    """Run the cell so many times, each time from a ledger that was just opened."""
    for _ in range(times - 1):
        nbdyn.ledger(folder).run_cell(name, body, "a-*", **more)
    return nbdyn.ledger(folder).run_cell(name, body, "a-*", **more)


# Declare, test, replicate -----------------------------------------------------------------------------------------


def test_the_first_run_declares_and_computes_nothing(give: Give):
    folder = give("a-0", "a-1")
    found = again(folder, 1, level=0.01)
    assert (found.state, found.kind, found.outcome, found.verdict) == ("declared", "confirmatory", None, "not tested")
    assert (found.claim, found.measure, found.test) == ("It learns.", "mean(loss) during epoch 1", "< 2, t over runs")
    assert (found.level, found.runs, [run["run"] for run in found.found]) == (0.01, "a-*", ["a-0", "a-1"])
    notes = nbdyn.open(folder / "a-0").notes
    assert "statement" not in set(notes["kind"])
    assert notes["text"].iloc[-1].startswith("declared learns; ledger ")


def test_the_next_tests_and_the_numbers_are_those_of_scipy(give: Give):
    folder = give("a-0", "a-1", "a-2", "a-3", "b-0")
    found = again(folder, 2, level=0.1)
    values = losses(folder, "a-0", "a-1", "a-2", "a-3")
    done = found.outcome
    assert done is not None and done.event == "tested"
    assert done.runs["run"].tolist() == ["a-0", "a-1", "a-2", "a-3"]
    assert done.runs["value"].to_numpy() == pytest.approx(values)
    reference = stats.ttest_1samp(values, 2.0, alternative="less")
    interval = stats.ttest_1samp(values, 2.0).confidence_interval(0.9)
    assert (done.n, done.p) == (4, pytest.approx(reference.pvalue))
    assert (done.effect, done.low, done.high) == pytest.approx((values.mean() - 2, interval.low - 2, interval.high - 2))
    assert (found.state, found.kind, found.verdict) == ("tested", "confirmatory", "supported")


def test_further_runs_of_the_cell_change_nothing_without_new_runs(give: Give, capsys: pytest.CaptureFixture[str]):
    folder = give("a-0", "a-1")
    first = again(folder, 2)
    entries = nbdyn.ledger(folder).entries
    options.quiet = False
    found = nbdyn.ledger(folder).run_cell("learns", BODY, "a-*")
    assert "the outcome stays. A replication needs 2 new runs or more; new: none" in capsys.readouterr().out
    assert found.outcome == first.outcome and nbdyn.ledger(folder).entries == entries


def test_new_runs_replicate_and_only_they(give: Give):
    folder = give("a-0", "a-1", "a-2")
    first = again(folder, 2)
    give("a-3")
    assert again(folder, 1).replications == ()  # one new run: too few
    give("a-4", "a-5")
    found = again(folder, 1)
    assert found.outcome == first.outcome
    (more,) = found.replications
    assert more.event == "replicated" and more.runs["run"].tolist() == ["a-3", "a-4", "a-5"]
    values = losses(folder, "a-3", "a-4", "a-5")
    assert more.p == pytest.approx(stats.ttest_1samp(values, 2.0, alternative="less").pvalue)
    assert (found.state, more.kind) == ("replicated 1/1", "confirmatory")
    assert found.p_holm == first.p_holm  # a replication is no further hypothesis of the family


def test_a_replication_on_runs_that_were_looked_at_is_set_apart(give: Give):
    folder = give("a-0", "a-1")
    again(folder, 2)
    give("a-2", "a-3")
    ask(folder, "a-3")
    found = again(folder, 1)
    assert found.state == "tested (+1 exploratory)"
    assert found.replications[0].reasons == ("data of a-3 was seen before the replication",)


def test_declared_before_any_run_is_there(tmp_path: Path, give: Give):
    folder = tmp_path / "runs"
    found = again(folder, 1)
    assert found.found == () and found.kind == "confirmatory"
    with pytest.raises(Incompatible, match=r'no run matches "a-\*"; "< 2, t over runs" needs 2 at least'):
        again(folder, 1)
    give("a-3", "a-4")
    assert again(folder, 1).verdict in ("supported", "not supported")


def test_one_run_is_refused(give: Give):
    folder = give("a-0", "b-0")
    again(folder, 1)
    with pytest.raises(Incompatible, match=r'1 run of 2 needed match "a-\*"; .* Record further runs'):
        again(folder, 1)
    assert len(nbdyn.ledger(folder).entries) == 1


def test_a_number_of_runs_fixed_beforehand(give: Give):
    folder = give("a-0", "a-1")
    body = BODY.replace("over runs", "over 3 runs")
    again(folder, 1, body)
    with pytest.raises(Incompatible, match="2 runs of 3 needed"):
        again(folder, 1, body)
    give("a-2", "a-3")
    ask(folder, "a-0")  # to look does not matter: neither hypothesis nor runs can be chosen now
    found = again(folder, 1, body)
    assert found.kind == "confirmatory" and found.outcome is not None
    assert found.outcome.runs["run"].tolist() == ["a-0", "a-1", "a-2"]  # those recorded first


def test_a_run_that_went_on_after_a_look_is_not_fixed(give: Give):
    """Their number is fixed, but not where they end."""
    folder, body = give("a-0", "a-1"), BODY.replace("over runs", "over 2 runs")
    again(folder, 1, body)
    ask(folder, "a-1")
    record(folder / "a-1", 1, epochs=1, mode="resume")
    found = again(folder, 1, body)
    assert found.reasons == ("runs were added or went on after the declaration, and data of a-1 was seen",)


# What was seen ----------------------------------------------------------------------------------------------------


def test_runs_that_were_asked_before_make_it_exploratory(give: Give):
    folder = give("a-0", "a-1")
    ask(folder, "a-1")
    found = again(folder)
    assert (found.kind, found.reasons) == ("exploratory", ("data of a-1 was asked for before",))
    assert found.verdict in ("suggested", "not suggested")
    assert found.found[0]["looks"] == 0 and found.found[1]["looks"] == 1


def test_an_allocation_that_is_opened_is_a_look_and_one_that_is_recorded_is_none(give: Give):
    folder = give("lca-0", "lca-1")
    body = BODY.replace("mean(loss) during epoch 1", "mean(loss) over all")
    assert nbdyn.ledger(folder).run_cell("first", body, "lca-*").kind == "confirmatory"
    nbdyn.open(folder / "lca-1").lca(name="train")
    found = nbdyn.ledger(folder).run_cell("second", body, "lca-*")
    assert found.reasons == ("data of lca-1 was asked for before",)
    assert nbdyn.open(folder / "lca-1").notes["text"].tolist()[-2] == "loss change allocation train"


def test_to_explain_a_statement_or_open_a_run_is_no_look(give: Give):
    folder = give("a-0", "a-1")
    ask(folder, "a-1", "explain show loss")
    nbdyn.open(folder / "a-0").note("a remark")
    assert again(folder, 1).kind == "confirmatory"


def test_looks_after_the_declaration_do_not_matter_for_fixed_runs(give: Give):
    folder = give("a-0", "a-1")
    again(folder, 1)
    ask(folder, "a-0")
    assert again(folder, 1).kind == "confirmatory"


def test_runs_added_after_a_look_make_it_exploratory(give: Give):
    folder = give("a-0", "a-1")
    again(folder, 1)
    ask(folder, "a-0")
    give("a-2")
    found = again(folder, 1)
    assert found.kind == "exploratory" and "runs were added or went on after the declaration" in found.reasons[0]


def test_runs_added_without_a_look_do_not(give: Give):
    folder = give("a-0", "a-1")
    again(folder, 1)
    give("a-2")
    assert again(folder, 1).kind == "confirmatory"


def test_a_run_that_was_taken_away_makes_it_exploratory(give: Give):
    folder = give("a-0", "a-1", "a-2")
    again(folder, 1)
    os.rename(folder / "a-1", folder / "bad")
    found = again(folder, 1)
    assert found.reasons == ("a-1 was there at the declaration, and is missing or recorded anew",)


def test_a_test_is_a_look_for_the_hypotheses_that_follow(give: Give):
    folder = give("a-0", "a-1")
    again(folder, 2)
    assert again(folder, 1, BODY.replace("mean", "max"), "second").kind == "exploratory"


def test_declared_before_the_first_test_all_are_confirmatory(give: Give):
    folder = give("a-0", "a-1")
    names = ["one", "two", "three"]
    for _ in range(2):
        for name in names:
            again(folder, 1, name=name)
    ledger = nbdyn.ledger(folder)
    assert {ledger[name].kind for name in names} == {"confirmatory"} and {ledger[n].family for n in names} == {3}


# Amendments -------------------------------------------------------------------------------------------------------


def test_a_change_before_data_is_seen_is_a_correction(give: Give):
    folder = give("a-0", "a-1")
    again(folder, 1)
    found = again(folder, 1, BODY.replace("< 2", "< 1.5"))
    assert (found.version, found.kind, found.family) == (2, "confirmatory", 1)
    old = nbdyn.ledger(folder).hypotheses[0]
    assert (old.state, old.test, old.verdict) == ("withdrawn", "< 2, t over runs", "")


def test_a_change_after_the_test_is_marked_and_the_first_stays(give: Give):
    """Of claim, measure, relation or method."""
    folder = give("a-0", "a-1")
    first = again(folder, 2)
    changes = [("It learns", "It unlearns"), ("mean(loss)", "max(loss)"), ("< 2", "> 2"), (", t", ", wilcoxon")]
    for version, change in enumerate(changes, 2):
        found = again(folder, 1, BODY.replace(*change))
        assert found.version == version and found.kind == "exploratory"
        assert "amended after version 1 was tested" in found.reasons
        old = nbdyn.ledger(folder).hypotheses[0]
        assert old.outcome == first.outcome and old.state == "tested, amended" and old.verdict == first.verdict


def test_a_change_of_level_or_runs_is_an_amendment_too(give: Give):
    folder = give("a-0", "a-1", "b-0", "b-1")
    again(folder, 2)
    assert again(folder, 1, level=0.2).reasons[-1] == "amended after version 1 was tested"
    found = nbdyn.ledger(folder).run_cell("learns", BODY, "b-*")
    assert found.version == 3 and found.kind == "exploratory"  # b was not looked at, a's outcome was
    assert found.reasons == (
        "amended after version 1 was tested", "amended after data of runs of version 2 was seen",
    )  # fmt: skip
    third = nbdyn.ledger(folder).run_cell("learns", BODY.replace("It learns", "It does"), "b-*")
    fourth = nbdyn.ledger(folder).run_cell("learns", BODY, "b-*")
    assert third.reasons == fourth.reasons == found.reasons  # although versions 3 and 4 are untested, and b unseen
    assert [one.corrected for one in nbdyn.ledger(folder).hypotheses] == [False] * 5


def test_a_change_after_the_other_group_was_seen_is_no_correction(give: Give):
    folder = give("a-0", "a-1", "b-0", "b-1")
    again(folder, 1, BODY.replace("< 2", '< "b-*"'))
    ask(folder, "b-1")
    found = again(folder, 1)
    assert (found.kind, found.reasons) == ("exploratory", ("amended after data of runs of version 1 was seen",))
    assert not nbdyn.ledger(folder).hypotheses[0].corrected


def test_a_change_after_runs_were_taken_away_is_no_correction(give: Give):
    """Whoever has looked could else move the runs, name others, and have one hypothesis less to count."""
    folder = give("a-0", "a-1", "b-0", "b-1")
    again(folder, 1)
    ask(folder, "a-1")
    os.rename(folder / "a-1", folder.parent / "a-1")
    found = nbdyn.ledger(folder).run_cell("learns", BODY, "b-*")
    assert (found.kind, found.reasons) == ("exploratory", ("amended after a-1 of version 1 was taken away",))
    assert not nbdyn.ledger(folder).hypotheses[0].corrected


def test_what_is_given_up_after_a_look_still_counts(give: Give):
    folder = give("a-0", "a-1", "a-2", "b-0", "b-1", "b-2")
    ledger = nbdyn.ledger(folder)
    for name in ("one", "two", "three"):
        ledger.declare(name, "c", "mean(loss)", "< 2, t over runs", "b-*")
    again(folder, 2)
    tested = ledger["learns"]
    assert tested.family == 4 and tested.p_holm == pytest.approx(4 * tested.outcome.p)  # type: ignore[union-attr]
    ask(folder, "b-0")
    for name in ("one", "two", "three"):
        assert ledger.declare(name, "other", "mean(loss)", "< 2, t over runs", "b-*").kind == "exploratory"
    assert ledger["learns"].p_holm == tested.p_holm and ledger["learns"].p_anytime == tested.p_anytime


def test_the_same_in_other_blanks_is_no_change(give: Give):
    folder = give("a-0", "a-1")
    again(folder, 1)
    assert again(folder, 1, BODY.replace("mean(loss)", "mean( loss )").replace("< 2,", "<2.0 ,")).state == "tested"


# Groups -----------------------------------------------------------------------------------------------------------


def test_two_groups(give: Give):
    folder = give("a-0", "a-1", "a-2", "b-0", "b-1")
    found = again(folder, 2, BODY.replace("< 2", '!= "b-*"'))
    a, b = losses(folder, "a-0", "a-1", "a-2"), losses(folder, "b-0", "b-1")
    assert found.outcome is not None and found.outcome.n == 5
    assert found.outcome.p == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)
    assert found.outcome.effect == pytest.approx(a.mean() - b.mean())
    assert found.outcome.runs["group"].tolist() == [0, 0, 0, 1, 1]


def test_pairs_by_the_recorded_seed(give: Give):
    folder = give("a-0", "a-1", "a-2", "b-1", "b-2", "b-3")
    found = again(folder, 2, BODY.replace("< 2, t", '!= "b-*", paired t'))
    difference = losses(folder, "a-0", "a-1", "a-2") - losses(folder, "b-3", "b-2", "b-1")
    assert found.outcome is not None and found.outcome.pairing == "paired by the recorded seed"
    assert found.outcome.p == pytest.approx(stats.ttest_1samp(difference, 0).pvalue)


def test_pairs_by_the_order_of_names(give: Give):
    folder = give("a-0", "a-1", "a-2", "b-0", "b-1", "b-2")
    found = again(folder, 2, BODY.replace("< 2, t", '< "b-*", paired t'))
    difference = losses(folder, "a-0", "a-1", "a-2") - losses(folder, "b-0", "b-1", "b-2")
    assert found.outcome is not None and found.outcome.n == 3
    assert found.outcome.p == pytest.approx(stats.ttest_1samp(difference, 0, alternative="less").pvalue)
    assert found.outcome.pairing == "paired by the order of names, for seeds do not pair them"


def test_pairs_that_differ_by_rounding_do_not_differ(give: Give, monkeypatch: pytest.MonkeyPatch):
    folder = give("a-0", "a-1", "a-2", "b-0", "b-1", "b-2")
    monkeypatch.setattr(trial, "values_of", lambda *_: [0.3, 0.1 + 0.2, 0.8, 0.1 + 0.2, 0.3, 0.7 + 0.1])
    found = again(folder, 2, BODY.replace("< 2, t", '< "b-*", paired t'))
    assert found.outcome is not None and found.outcome.effect == 0 and found.verdict == "none: the runs do not differ"


def test_groups_that_do_not_pair_or_overlap_are_refused(give: Give):
    folder = give("a-0", "a-1", "a-2", "b-0", "b-1")
    body = BODY.replace("< 2, t", '< "b-*", paired t')
    again(folder, 1, body)
    with pytest.raises(NbdynError, match="3 runs cannot be paired with 2"):
        again(folder, 1, body)
    with pytest.raises(Incompatible, match="a-1 is in both groups of runs"):
        again(folder, 1, BODY.replace("< 2", '< "?-1"'), "overlap")
    with pytest.raises(Incompatible, match="is in another folder than this ledger"):
        again(folder, 1, BODY.replace("< 2", '< "elsewhere/b-*"'), "elsewhere")


# Measures ---------------------------------------------------------------------------------------------------------


MEASURES: dict[str, Callable[[nbdyn.Run], Any]] = {
    "loss at step 3": lambda run: run.steps["loss"][3],
    "last(accuracy) over all": lambda run: run.steps["accuracy"].iloc[-1],
    "share(|grad| > 1)": lambda run: (run.steps["grad_norm"] > 1).mean(),
    "dist(w, init) at step 5": lambda run: np.linalg.norm(run.weights["all"][5] - run.weights["all"][0]),
}


def test_measures_are_what_frames_give(give: Give):
    folder = give("a-0", "a-1", "a-2")
    ledger, opened = nbdyn.ledger(folder), [nbdyn.open(folder / f"a-{number}") for number in range(3)]
    for number, (measure, reference) in enumerate(MEASURES.items()):
        ledger.declare(f"m{number}", "c", measure, "> 0, t over runs", "a-*")
        done = ledger.test(f"m{number}").outcome
        expected = np.array([reference(run) for run in opened], np.float64)
        assert done is not None and done.runs["value"].to_numpy() == pytest.approx(expected, rel=1e-5)
    ledger.declare("none", "c", "sum |grad| of 0.weight at step 2", "> 0, t over runs", "a-*")
    with pytest.raises(NotRecorded):
        ledger.test("none")
    assert ledger["none"].state == "declared"


def test_progress_is_that_of_all_runs_together(give: Give):
    folder = give("a-0", "a-1", "a-2")
    found = again(folder, 2, "c\nmeasure: progress(loss) at step 4\ntest: > 0, t over runs")
    tables = [nbdyn.open(folder / f"a-{number}").steps["loss"] for number in range(3)]
    low = min(table.min() for table in tables)
    assert found.outcome is not None
    assert found.outcome.runs["value"].tolist() == pytest.approx([(t[0] - t[4]) / (t[0] - low) for t in tables])


LCA_MEASURES: dict[str, Callable[[Any], Any]] = {
    "sum lca of 2 over all": lambda lca: lca.layers.set_index("layer")["lca"]["2"],
    "sum lca in train": lambda lca: lca.layers["lca"].sum(),
    "sum lca of 0.weight during epoch 1": lambda lca: lca.series("tensor")["0.weight"].iloc[3:].sum(),
    "mean lca of 2.bias at step 2": lambda lca: lca.series("tensor")["2.bias"].iloc[2] / 4,
    "sum lca of 2.weight[1,:] during steps 1..4": lambda lca: lca.cells("2.weight[1,:]", slice(1, 5)).sum(),
}


def test_lca_measures_are_those_of_the_allocation(give: Give):
    folder = give("lca-0", "lca-1")
    ledger = nbdyn.ledger(folder)
    for number, measure in enumerate(LCA_MEASURES):
        declared = ledger.declare(f"m{number}", "c", measure, "< 0, t over runs", "lca-*")
        assert declared.reasons == ("an allocation of lca-0, lca-1 was computed before",)
    allocations = [nbdyn.open(folder / name).lca(name="train") for name in ("lca-0", "lca-1")]
    for number, expected in enumerate(LCA_MEASURES.values()):
        done = ledger.test(f"m{number}").outcome
        assert done is not None
        assert done.runs["value"].tolist() == pytest.approx([expected(lca) for lca in allocations], rel=1e-5)


def test_lca_without_an_allocation_says_so(give: Give):
    folder = give("a-0", "a-1")
    with pytest.raises(NotRecorded, match=r"it has none; run.lca\(data, loss_fn\) computes one"):
        again(folder, 2, "c\nmeasure: sum lca\ntest: < 0, t over runs")


def final_loss(run: nbdyn.Run) -> float:
    return float(run.steps["loss"].iloc[-1])


def test_a_measure_in_python_is_frozen_with_its_source(give: Give):
    folder = give("a-0", "a-1", "a-2")
    ledger = nbdyn.ledger(folder)
    ledger.declare("own", "It ends low.", final_loss, "< 2, t over runs", "a-*")
    with pytest.raises(Incompatible, match=r"give it again, ledger.test\(\"own\", measure=...\)"):
        ledger.test("own")
    with pytest.raises(Incompatible, match="is not the measure that was declared"):
        ledger.test("own", measure=losses)
    found = nbdyn.ledger(folder).test("own", measure=final_loss)
    assert found.source.startswith("def final_loss(run") and found.outcome is not None
    expected = [nbdyn.open(folder / f"a-{n}").steps["loss"].iloc[-1] for n in range(3)]
    assert found.outcome.runs["value"].tolist() == pytest.approx(expected)


def test_a_function_without_source_or_number_is_refused(give: Give):
    folder = give("a-0", "a-1")
    ledger = nbdyn.ledger(folder)
    with pytest.raises(Incompatible, match="has no source that could be kept"):
        ledger.declare("own", "c", len, "< 2, t over runs", "a-*")
    ledger.declare("own", "c", record, "< 2, t over runs", "a-*")

    def words(run: nbdyn.Run) -> str:
        return run.name

    ledger.declare("words", "c", words, "< 2, t over runs", "a-*")
    with pytest.raises(Incompatible, match="words gives a str for a-0"):
        ledger.test("words", measure=words)


def test_a_measure_that_fails_leaves_the_declaration_alone(give: Give):
    ledger = nbdyn.ledger(give("a-0", "a-1"))
    wrong: list[tuple[str, type[Exception], str]] = [
        ("mean(los)", NbdynError, 'did you mean "loss"'),
        ("loss during epoch 1", QueryError, "gives 3 rows for a-0; a hypothesis needs one number a run"),
        ("loss at step 99", QueryError, "step 99 is not recorded"),
        ("mean(loss) where class > 99", Incompatible, "Leaving the run out would be a choice"),
        ("dist(w, init) at step 99", NbdynError, "99"),
    ]
    for number, (measure, error, message) in enumerate(wrong):
        ledger.declare(f"m{number}", "c", measure, "< 2, t over runs", "a-*")
        with pytest.raises(error, match=message):
            ledger.test(f"m{number}")
    assert [entry["event"] for entry in ledger.entries] == ["declared"] * 5


# What is refused --------------------------------------------------------------------------------------------------


def test_a_copy_of_a_run_is_refused(give: Give):
    folder = give("a-0", "a-1", "a-0>a-9")
    again(folder, 1)
    with pytest.raises(Incompatible, match="a-9 and a-0 have the same loss at every step: a copy, or the same seed"):
        again(folder, 1)


def losses_of(name: str, values: list[float]) -> Any:
    return SimpleNamespace(name=name, steps_committed=len(values), read_steps=lambda *_: {"loss": np.array(values)})


def test_a_copy_that_went_on_is_refused_and_groups_may_begin_alike():
    """The same seed for three steps and for two: two would count twice. A treatment that sets in later is none."""
    long, other = losses_of("long", [3.0, 2.0, 1.0]), losses_of("other", [3.0, 2.0, 4.0])
    short, lost = losses_of("short", [3.0, 2.0]), [losses_of(name, [np.nan] * 2) for name in "xy"]
    looks.check_distinct([[long, other, *lost], [short]])
    for group in ([long, short], [short, long], [other, *lost, long, short]):
        with pytest.raises(Incompatible, match="have the same loss at the 2 steps of one: a copy, or the same seed"):
            looks.check_distinct([group, []])
    with pytest.raises(Incompatible, match="other and long have the same loss at every step"):
        looks.check_distinct([[long], [losses_of("other", [3.0, 2.0, 1.0])]])


def test_a_run_that_is_still_recorded_is_refused(give: Give):
    folder = give("a-0")
    model = torch.nn.Linear(2, 2)
    live = nbdyn.record(folder / "a-1", model, torch.optim.SGD(model.parameters(), 0.1), torch.nn.MSELoss())
    again(folder, 1)
    with pytest.raises(Incompatible, match="a-1 is still being recorded"):
        again(folder, 1)
    live.close()


def test_names_levels_and_places(give: Give, tmp_path: Path):
    ledger = nbdyn.ledger(give("a-0", "a-1"))
    with pytest.raises(UnknownName, match='no hypothesis is called "lerns"; there are none'):
        ledger.test("lerns")
    ledger.run_cell("learns", BODY, "a-*")
    with pytest.raises(UnknownName, match='did you mean "learns"'):
        ledger["lerns"]
    for level in (0.0, -1.0, 0.7, float("nan")):
        with pytest.raises(Incompatible, match=r"is not in 0\.\.0\.5"):
            ledger.run_cell("x", BODY, "a-*", level)
    with pytest.raises(Incompatible, match="in another folder"):
        ledger.run_cell("x", BODY, str(tmp_path / "other" / "a-*"))
    with pytest.raises(Incompatible, match="claim is missing"):
        ledger.declare("x", " ", "mean(loss)", "> 0, t over runs", "a-*")
    with pytest.raises(Incompatible, match="a ledger needs a folder of this machine"):
        nbdyn.ledger("s3://bucket/runs")
    assert len(ledger.entries) == 1


def test_runs_that_do_not_differ_give_no_verdict(give: Give):
    folder = give("a-0", "a-1")
    found = again(folder, 2, "c\nmeasure: max(lr)\ntest: < 2, t over runs")
    assert found.outcome is not None and np.isnan(found.outcome.p)
    assert found.verdict == "none: the runs do not differ" and np.isnan(found.p_holm)


# Several processes ----------------------------------------------------------------------------------------------------


def test_a_ledger_of_another_process_meanwhile(give: Give, monkeypatch: pytest.MonkeyPatch):
    """Another process finishes the same test while this one computes: its outcome stays."""
    from nbdyn.analysis.ledger import ledger as module

    folder = give("a-0", "a-1")
    again(folder, 1)
    first, real = Ledger(folder), module.decide

    def slow(*args: Any) -> Any:
        monkeypatch.setattr(module, "decide", real)
        Ledger(folder).test("learns")
        return real(*args)

    monkeypatch.setattr(module, "decide", slow)
    found = first.test("learns")
    assert [entry["event"] for entry in first.entries] == ["declared", "tested"]
    assert found.state == "tested" and found.replications == ()
