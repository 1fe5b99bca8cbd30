"""Flow matching itself, on tensors: couple the snapshots, choose paths between the paired cells, learn the velocity.

To learn it, read in this order; each needs only what comes before it to be understood.

1. ``snapshots.py``: the data, cells at times, and the intervals between them.
2. ``coupling/independent.py``, then ``coupling/exact.py``: which cells of an interval's two ends are paired.
3. ``probability_path.py``, `ProbabilityPath.sample` and `Straight`: a point between two paired cells and the velocity
   there, which is what a network is to predict.
4. ``problem.py``, `Problem.sample`: the training data of one fit.
5. ``vector_field.py``, `NeuralField.evaluate`: the network, in the user's units.
6. ``flow_matching.py``, the loss and the loop: all of flow matching is there.
7. ``integrate.py``, `push`: cells moved along the field.

That is OT-CFM (and I-CFM, with the independent coupling). SB-CFM takes ``coupling/entropic.py``, `BrownianBridge` and
`simulate` instead. The default, UOT-CFM, adds growth (``coupling/unbalanced.py``, ``coupling/growing.py``) and curved
paths (``tangents.py``); ``docs/default.md`` derives it. ``closed_form.py`` is the field that is averaged instead of
trained; ``hold_out.py`` and ``judgement.py`` make restorations and judge them.

Some files only make others faster, and can be passed over at first: ``coupling/shortlist.py``, ``coupling/kernel.py``,
``coupling/fused.py``, ``replay.py``, ``threads.py``, ``exponential.py`` and ``euclidean.py``.
"""
