"""Models of transformers are built one at a time, whatever thread asks for them.

While it loads one, transformers exchanges methods of the class that all of them share: no weights are tied or drawn, in
any thread. Of two models loaded at once, the second to begin puts the exchanged methods back for good.
"""

import threading

BUILDING = threading.RLock()
"""Held while a model of transformers is made or loaded."""
