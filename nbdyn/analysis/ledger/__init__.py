"""The ledger of hypotheses: declared before the data is seen, tested once, corrected for how many there are."""

from nbdyn.analysis.ledger.chain import Tampered
from nbdyn.analysis.ledger.ledger import Ledger
from nbdyn.analysis.ledger.records import Hypothesis, Outcome

__all__ = ["Hypothesis", "Ledger", "Outcome", "Tampered"]
