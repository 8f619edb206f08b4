"""What the curves of a laboratory's page can be told apart by."""

from nfnet.normalizers.registry import list_methods
from transfer.lab.build import lines_of
from transfer.lab.experiment import Experiment
from transfer.lab.page import names_of
from transfer.lab.table import LabRow
from transfer.report.plot_style import DASHES, line_style


def test_lines_of_one_method_are_named_by_what_differs() -> None:
    """The key once had one name four times over, for two batches and two rates."""
    experiment = Experiment(name="t", methods=("none",), batches=(64, 256), rates=(0.2, 6.4), each_rate=True)
    names = names_of([LabRow(line=line) for line in lines_of(experiment)])
    assert names == [f"none, batch {batch}, rate {rate}" for batch in (64, 256) for rate in (0.2, 6.4)]
    assert names_of([LabRow(line=line) for line in lines_of(Experiment(name="t", methods=("none",)))]) == ["none"]


def test_all_methods_have_lines_that_look_differently() -> None:
    styles = {line_style(i) for i in range(len(list_methods()))}
    assert len(styles) == len(list_methods()) and len(set(DASHES.values())) == len(DASHES)
