"""From the record files of a run directory to one self-contained page.

``collect`` reads files into plain tuples, ``compare`` sets plans side by side, ``figures`` draws,
``page`` writes. Nothing here imports the model side: a run made elsewhere can be reported without
torch.
"""

from __future__ import annotations
