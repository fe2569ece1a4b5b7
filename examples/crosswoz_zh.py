"""Chinese: which domain a user's utterance belongs to, characters as tokens, dense beside pruned in one table.

python examples/crosswoz_zh.py
"""

from sparseprune.runner import run_demo

result = run_demo(data="crosswoz_zh", density=0.1, name="crosswoz_zh")
print(f"accuracy kept: {result.record['accuracy_kept']:.3f}, times as fast: {result.record['speedup']:.2f}")
