"""Floor 3: the public ops. Each is registered with torch.library (schema, fake, autograd) as ``torch.ops.sparseprune.NAME``."""

from .masking import apply_mask_

__all__ = ["apply_mask_"]
