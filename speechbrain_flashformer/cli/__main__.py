"""``python -m speechbrain_flashformer.cli`` is the command ``flashformer``."""

import sys

from speechbrain_flashformer.cli import main

sys.exit(main())
