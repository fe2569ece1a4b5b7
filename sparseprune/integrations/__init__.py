"""Floor 10: other libraries, each imported only when its functions are called, or once the library itself is imported.

:mod:`.quantizer`, :mod:`.description`, :mod:`.placeholder`, :mod:`.conversion`: sparse folders of transformers, which
:mod:`.folder` opens by path; :mod:`.trainer`, :mod:`.terms`, :mod:`.learned`: pruning in its Trainer; :mod:`.peft`:
LoRA on sparse layers; :mod:`.onnx`: models for ONNX Runtime.
"""
