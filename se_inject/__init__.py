from .config import SEConfig
from .errors import NoSitesError, SEInjectError
from .inject import eject, inject, plan
