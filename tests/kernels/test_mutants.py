"""Hand-made faults of every kernel family, each a small change of its code, are noticed by the family's tests.

What the interpreter cannot show is not here: 32-bit products of rows and strides, missing barriers.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# All that the tests of a kernel family import.
PARTS = ("pyproject.toml", "kernels/*.py", "tests/__init__.py", "tests/conftest.py", "tests/kernels/*.py")

# The examples of tests/conftest.py, without the minutes that hypothesis takes to find the smallest that fails.
UNSHRUNK = """
from hypothesis import Phase, settings

settings.register_profile("unshrunk", deadline=None, derandomize=True, max_examples=25, phases=[Phase.generate])
"""

# What stands in kernels/<family>.py, and what stands there in the mutant.
MUTANTS: dict[str, tuple[tuple[str, str], ...]] = {
    "rms_norm": (
        ("F.rms_norm(x, w.shape, w, eps)", "F.rms_norm(x, w.shape, w)"),
        (
            "h = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0)",
            "h = tl.load(x_ptr + row * x_stride + column, mask=mask, other=1.0)",
        ),
        (
            "h = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0)",
            "h = tl.load(x_ptr + row * x_stride + column, mask=row < num_rows, other=0.0)",
        ),
        ("tl.sum(h * h, axis=1)", "tl.sum((h * h).to(x_ptr.dtype.element_ty).to(SUM), axis=1)"),
        ("tl.sum(h * h, axis=1) / width + eps", "tl.sum(h * h, axis=1) / width"),
        ("tl.sum(h * h, axis=1) / width + eps", "tl.sum(h * h, axis=1) / BLOCK + eps"),
        ("x_ptr + row * x_stride + column", "x_ptr + row * width + column"),
        ("residual_ptr + row * residual_stride", "residual_ptr + row * x_stride"),
        ("        h = h_stored.to(SUM)\n", ""),
        ("dy_ptr + row * dy_stride", "dy_ptr + row * width"),
        ("h_ptr + row * h_stride + column", "h_ptr + row * width + column"),
        ("dh_ptr + row * dh_stride", "dh_ptr + row * dy_stride"),
        ("dx = rstd * (g - n *", "dx = rstd * (g + n *"),
        ("tl.sum(g * n, axis=1)[:, None] / width", "tl.sum(g * n, axis=1)[:, None]"),
        ("return dx, dx if ctx.has_residual else None, dw, None", "return dx, dh, dw, None"),
        ("return dh, dh, None, None", "return None, None, None, None"),
        ("dw += tl.sum(dy * n, axis=0)", "dw = tl.sum(dy * n, axis=0)"),
        ("tl.program_id(0).to(tl.int64) + i * tl.num_programs(0)", "tl.program_id(0).to(tl.int64) + i"),
        ("TILES=-(-num_tiles // num_programs)", "TILES=num_tiles // num_programs"),
        ("_backward_kernel[(num_programs,)](", "_backward_kernel[(min(num_programs, num_rows),)]("),
        ("partial_dw_PN.sum(dim=0)", "partial_dw_PN[0]"),
        ("HAS_DH=dh is not None, IN_FP64=h.dtype == torch.float64", "HAS_DH=dh is not None, IN_FP64=False"),
        (
            "x.new_empty(x.numel() // max(1, x.shape[-1]), dtype=sum_dtype(x))",
            "x.new_empty(x.numel() // max(1, x.shape[-1]))",
        ),
    ),
    "rope": (
        ("rotated = a * cos - b * sin, b * cos + a * sin", "rotated = a * cos + b * sin, b * cos - a * sin"),
        ("q_a * cos - q_b * sin", "q_a * cos + q_b * sin"),
        ("k_b * cos + k_a * sin", "k_b * cos - k_a * sin"),
        ("        sin = -sin\n", "        cos = -cos\n"),
        ("ctx.interleaved, not ctx.inverse)", "ctx.interleaved, ctx.inverse)"),
        ("cos, sin, interleaved, inverse=False)", "cos, sin, False, inverse=False)"),
        ("table = position.to(tl.int64) * HALF + half", "table = (position + sequence).to(tl.int64) * HALF + half"),
        ("in_sequence = position < length", "in_sequence = row < length"),
        ("q_ptr + row * q_stride", "q_ptr + row * k_stride"),
        ("v_ptr + row * v_stride", "v_ptr + row * v_out_stride"),
        ("v_out_ptr + row * v_out_stride", "v_out_ptr + row * (KV_HEADS * 2 * HALF)"),
        ("        tl.store(v_out_ptr + row * v_out_stride + v_offset, v, mask=v_mask)\n", ""),
        ("BLOCK_KV_HEADS=block_kv_heads", "BLOCK_KV_HEADS=1"),
        ("tl.load(head_ptr + half + HALF,", "tl.load(head_ptr + half + BLOCK_HALF,"),
        ("tl.join(a, b)", "tl.join(b, a)"),
        (
            "mask=in_sequence & (half < HALF), other=0.0).to(SUM)\n    if INVERSE",
            "mask=in_sequence & (half < HALF), other=0.0).to(q_ptr.dtype.element_ty).to(SUM)\n    if INVERSE",
        ),
        ("torch.float64 in (q_MN.dtype, cos_TK.dtype)", "q_MN.dtype == torch.float64"),
        ("cos_TK.contiguous(), sin_TK.contiguous()", "cos_TK, sin_TK"),
        ("-(-length // positions_per_tile)", "max(1, length // positions_per_tile)"),
        (
            "exponent_K = torch.arange(0, head_size, 2, dtype=angle_dtype, device=positions_T.device) / head_size",
            "exponent_K = torch.arange(1, head_size, 2, dtype=angle_dtype, device=positions_T.device) / head_size",
        ),
        ("angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32", "angle_dtype = torch.float32"),
    ),
    "swiglu": (
        ("y = gate * _sigmoid(gate) * up", "y = up * _sigmoid(up) * gate"),
        ("tl.where(z < 0, e, 1.0)", "tl.where(z < 0, 1.0, e)"),
        (
            "e = tl.exp(-tl.abs(z))\n    return tl.where(z < 0, e, 1.0) / (1.0 + e)",
            "e = tl.exp(z)\n    return e / (1.0 + e)",
        ),
        ("dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))", "dgate = dy * up * sigmoid"),
        ("(1.0 + gate * (1.0 - sigmoid))", "(1.0 - gate * (1.0 - sigmoid))"),
        ("dup = dy * gate * sigmoid", "dup = dy * sigmoid"),
        ("y.to(y_ptr.dtype.element_ty), mask=mask", "y.to(y_ptr.dtype.element_ty), mask=mask & (column < width - 1)"),
        (
            "dup.to(gradient_ptr.dtype.element_ty), mask=mask",
            "dup.to(gradient_ptr.dtype.element_ty), mask=mask & (row < num_rows - 1)",
        ),
        ("row * gate_up_stride + column\n    gate =", "row * (2 * width) + column\n    gate ="),
        ("row * gate_up_stride + column\n    dy =", "row * (2 * width) + column\n    dy ="),
        ("dy_ptr + row * dy_stride", "dy_ptr + row * width"),
        (
            "up = tl.load(gate_ptr + width, mask=mask, other=0.0).to(SUM)\n    y =",
            "up = tl.load(gate_ptr + BLOCK, mask=mask, other=0.0).to(SUM)\n    y =",
        ),
        ("tl.store(dgate_ptr, dgate.to", "tl.store(dgate_ptr, dup.to"),
        ("IN_FP64=gate_up.dtype == torch.float64", "IN_FP64=False"),
        ("column_tiles = -(-width // columns)", "column_tiles = max(1, width // columns)"),
        ("-(-num_rows // rows) * column_tiles", "max(1, num_rows // rows) * column_tiles"),
        ("gate, up = gate_up.chunk(2, dim=-1)", "up, gate = gate_up.chunk(2, dim=-1)"),
    ),
    "cross_entropy": (
        (
            "torch.where(targets_M != IGNORE, c_MV.logsumexp(dim=-1).square(), 0.0)",
            "c_MV.logsumexp(dim=-1).square()",
        ),
        (
            'c = tl.where(mask, _capped(logits, soft_cap, IN_FP64), float("-inf"))\n        shift =',
            "c = _capped(logits, soft_cap, IN_FP64)\n        shift =",
        ),
        ("totals = totals * tl.exp(before - shift) +", "totals = totals +"),
        ('shift = tl.where(largest == float("-inf"), 0.0, largest)', "shift = largest"),
        ("following = (i + 1) * BLOCK + column", "following = i * BLOCK + column"),
        ("block = (BLOCKS - 1 - i) * BLOCK + column", "block = (BLOCKS - i) * BLOCK + column"),
        ("total = tl.sum(e, axis=0)", "total = tl.sum(e.to(logits_ptr.dtype.element_ty).to(SUM), axis=0)"),
        ("tl.store(loss_ptr + row, tl.where(is_ignored, 0.0, loss))", "tl.store(loss_ptr + row, loss)"),
        ("return tl.where(is_ignored, 0.0, gradient)", "return gradient"),
        ("total = tl.where(is_inside | is_ignored, total,", "total = tl.where(target < width, total,"),
        ("    loss += z_loss * lse * lse\n", ""),
        ("scale = (1.0 + 2.0 * z_loss * lse) / total", "scale = 1.0 / total"),
        ("((1.0 + 2.0 * z_loss * (shift + tl.log(total))) / total)", "((1.0 + 2.0 * z_loss * tl.log(total)) / total)"),
        ("(shift - logit_sum / width + log_total)", "(shift - logit_sum / BLOCK + log_total)"),
        ("gradient -= label_smoothing / width", "gradient -= label_smoothing"),
        ("p - (1.0 - label_smoothing)", "p - 1.0"),
        ("gradient *= 1.0 - tanh * tanh", "gradient *= 1.0 - tanh"),
        ("tl.where(near < 0.25, y * series, tanh)", "tanh"),
        (
            "target_logit = _capped(tl.load(row_ptr + target, mask=is_inside, other=0.0), soft_cap, IN_FP64)",
            "target_logit = tl.load(row_ptr + target, mask=is_inside, other=0.0).to(SUM)",
        ),
        ("gradient = dloss * _gradient(", "gradient = _gradient("),
        ("dloss_ptr + row * dloss_stride", "dloss_ptr + row"),
        ("logits_ptr + row * logits_stride + column, mask", "logits_ptr + row * width + column, mask"),
        ("gradient_ptr + row * gradient_stride", "gradient_ptr + row * width"),
        ("owner = logits_MV if logits_MV._base is None else logits_MV._base", "owner = logits_MV"),
        ("logits_MV.stride(0) >= width", "logits_MV.stride(0) >= 0"),
        ("torch.log_softmax(logits_MV, dim=-1, dtype=sum_dtype(logits_MV))", "torch.log_softmax(logits_MV, dim=-1)"),
        ("gradient_MV.mul_((is_target_M * grads[0])[:, None])", "gradient_MV.mul_(grads[0][:, None])"),
        ("torch.full_like(index_M1, label_smoothing - 1, dtype=dtype)", "torch.full_like(index_M1, -1, dtype=dtype)"),
        ("lse_M = (c_MV.amax(dim=-1) - log_p_MV.amax(dim=-1))", "lse_M = -log_p_MV.amax(dim=-1)"),
    ),
    "linear_cross_entropy": (
        ("min(start + chunk_rows, num_rows)", "min(start + chunk_rows, num_rows - 1)"),
        ("range(0, num_rows, chunk_rows)", "range(0, max(1, num_rows - chunk_rows + 1), chunk_rows)"),
        ("is_first=start == 0", "is_first=True"),
        ("is_first=start == 0", "is_first=False"),
        (
            "head_VD.new_empty(head_VD.shape if head_gradient else 0, dtype=sum_dtype(head_VD))",
            "head_VD.new_empty(head_VD.shape if head_gradient else 0)",
        ),
        ("logits_CV.T, hidden_MD[rows], is_first", "logits_CV.T, hidden_MD[: rows.stop - start], is_first"),
        (
            "cross_entropy_gradient_(logits_CV, targets_M[rows], **options)",
            "cross_entropy_gradient_(logits_CV, targets_M[: rows.stop - start], **options)",
        ),
        ("cross_entropy_rows(logits_CV, targets_M[rows], **options)", "cross_entropy_rows(logits_CV, targets_M[rows])"),
        (
            "LossOptions(z_loss=z_loss, soft_cap=soft_cap, label_smoothing=label_smoothing)\n    (num_rows",
            "LossOptions(soft_cap=soft_cap, label_smoothing=label_smoothing)\n    (num_rows",
        ),
        (
            "LossOptions(z_loss=z_loss, soft_cap=soft_cap, label_smoothing=label_smoothing)\n        return",
            "LossOptions(z_loss=z_loss, soft_cap=soft_cap)\n        return",
        ),
        ("d_hidden = _scaled(d_hidden_MD, dloss)", "d_hidden = d_hidden_MD"),
        ("out=d_hidden_MD[rows]", "out=d_hidden_MD[: rows.stop - start]"),
        ("saved.mul_(factor) if type(saved) is Tensor else saved * factor", "saved * factor"),
        ("        d_head_VD.zero_()\n", "        pass\n"),
        ("hidden_MD.new_empty(min(chunk_rows, num_rows), vocab_size)", "hidden_MD.new_empty(num_rows, vocab_size)"),
        ("for operand in (hidden, head_VD)]", "for operand in (head_VD, hidden)]"),
        ("(1 + hidden_gradient + head_gradient)", "3"),
        ("-(-num_rows // most)", "num_rows // most"),
    ),
}


def mutated(family: str, old: str, new: str) -> str:
    """The text of the family's module with one change."""
    text = (ROOT / "kernels" / f"{family}.py").read_text()
    assert text.count(old) == 1, f"the table is out of date: kernels/{family}.py has {old!r} {text.count(old)} times"
    return text.replace(old, new)


def copy_of_the_repository(folder: Path) -> None:
    for file in (file for part in PARTS for file in ROOT.glob(part)):
        copy = folder / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    (folder / "unshrunk.py").write_text(UNSHRUNK)


def run_tests_of(family: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the family's tests of the copy in the folder, interpreted, to the first that fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "unshrunk", "--hypothesis-profile", "unshrunk"]
    command += [f"tests/kernels/test_{family}.py", "-m", "not slow and not gpu"]
    # First on the path, before the real repository that is installed.
    environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=540, check=False
    )


MUTANTS_OF_ALL = [
    pytest.param(family, *mutant, id=f"{family}-{number}")
    for family, mutants in MUTANTS.items()
    for number, mutant in enumerate(mutants)
]


def test_there_are_ten_mutants_of_every_family_and_each_is_python():
    for family, mutants in MUTANTS.items():
        assert len(set(mutants)) == len(mutants) >= 10
        for mutant in mutants:
            compile(mutated(family, *mutant), family, "exec")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", MUTANTS)
def test_without_a_change_the_tests_pass(family: str, tmp_path: Path):
    copy_of_the_repository(tmp_path)
    result = run_tests_of(family, tmp_path)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("family", "old", "new"), MUTANTS_OF_ALL)
def test_every_mutant_is_noticed(family: str, old: str, new: str, tmp_path: Path):
    copy_of_the_repository(tmp_path)
    (tmp_path / "kernels" / f"{family}.py").write_text(mutated(family, old, new))
    result = run_tests_of(family, tmp_path)
    # 1: a test failed. Negative: the interpreter crashed outside its memory. From 2 on, no test of the mutant ran.
    assert result.returncode == 1 or result.returncode < 0, f"{old!r} became {new!r}, and: {result.stdout}"
