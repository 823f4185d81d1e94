"""Choices that make no sense together."""

from collections.abc import Callable, Iterator

from omegaconf import DictConfig

from tokprune_exp.config.nodes import Chosen

SOURCES = ("directory", "hub", "wheel")
PRUNES_A_DENSE_MODEL = (
    ("LTP", "ltp"),
    ("STTABT", "sttabt"),
    ("ManualThreshold", "manual_threshold"),
    ("ManualTopK", "manual_topk"),
)
IMPOSSIBLE_PAIRS: list[tuple[Callable[[Chosen], bool], str]] = [
    *(
        (
            lambda of, part=part: of.kind("method") == "Finetune" and of(part) is not None,
            f"finetune takes no {part}: it trains the unpruned encoder",
        )
        for part in ("scorer", "retainer", "loss", "teacher")
    ),
    (
        lambda of: of.kind("method") == "Finetune" and of("budget") is not None,
        "finetune takes no budget: it prunes nothing",
    ),
    (
        lambda of: of.kind("method") == "ADTP" and of("compile") is True,
        "adtp cannot be compiled: its loss needs second derivatives, which torch.compile does not give",
    ),
    (
        lambda of: (
            of("trainer.precision") == "16-mixed"
            and of("trainer.accelerator") != "cpu"  # where it becomes bf16-mixed, whose gradients are not scaled
            and of.positive("trainer.gradient_clip_val")
            and of("optimizer.fused") is True
        ),
        "in 16-mixed gradients are scaled, and a fused optimizer unscales them too late to be clipped: "
        "set optimizer.fused=false, or trainer.precision=bf16-mixed",
    ),
    (
        lambda of: isinstance(of("budget"), int | float) and not 0 < of("budget") < 1,
        "budget is a share of the unpruned FLOPs: a number above 0 and below 1",
    ),
    *(
        (
            lambda of, method=method, retainer=retainer: (
                of.kind("method") == method and of("retainer") is not None and of.kind("retainer") not in retainer
            ),
            f"{name} prunes with retainer={' or '.join(files)}",
        )
        for method, name, retainer, files in (
            (
                "ADTP",
                "adtp",
                ("AdaptiveRatio", "Nucleus", "MinP", "StaticRatio", "RandomRatio"),
                ("adaptive", "nucleus", "min_p", "static", "random"),
            ),
            ("LTP", "ltp", ("LearnedThreshold",), ("learned_threshold",)),
            ("ManualThreshold", "manual_threshold", ("ManualThreshold",), ("manual_threshold",)),
            ("ManualTopK", "manual_topk", ("TopKSchedule",), ("topk",)),
            ("STTABT", "sttabt", ("Backtracking", "Concrete"), ("backtracking", "concrete")),
        )
    ),
    *(
        (
            lambda of, method=method, loss=loss: (
                of.kind("method") == method and of("loss") is not None and of.kind("loss") != loss
            ),
            f"{name} has a loss of its own: loss={name}",
        )
        for method, name, loss in (
            ("ADTP", "adtp", "ADTPLoss"),
            ("LTP", "ltp", "LTPLoss"),
            ("STTABT", "sttabt", "STTABTLoss"),
        )
    ),
    *(
        (
            lambda of, method=method, part=part: of.kind("method") == method and of(part) is None,
            f"{name} needs a {part}",
        )
        for method, name, parts in (
            ("ADTP", "adtp", ("scorer", "retainer", "loss")),
            ("LTP", "ltp", ("scorer", "retainer", "loss")),
            ("STTABT", "sttabt", ("scorer", "retainer", "loss")),
            ("ManualThreshold", "manual_threshold", ("scorer", "retainer")),
            ("ManualTopK", "manual_topk", ("scorer", "retainer")),
        )
        for part in parts
    ),
    *(
        (
            lambda of, method=method: of.kind("method") == method and of("loss") is not None,
            f"{name} takes no loss: it has the task's only",
        )
        for method, name in (("ManualThreshold", "manual_threshold"), ("ManualTopK", "manual_topk"))
    ),
    (
        lambda of: (
            of.kind("scorer") not in ("ApproxAttention", "ExactAttention")
            if of.kind("method") == "STTABT" and of.kind("retainer") in ("Backtracking", "Concrete")
            else of.kind("method") != "STTABT" and of.kind("scorer") in ("ApproxAttention", "ExactAttention")
        ),
        "scorer=approx_attention and exact_attention go with retainer=backtracking and concrete, and with no other",
    ),
    (
        lambda of: of("method.ratio_target") not in (None, "mass") and of.kind("retainer") != "AdaptiveRatio",
        "only an adaptive retainer learns its ratio: set retainer=adaptive or method.ratio_target=mass",
    ),
    (
        lambda of: (
            of("method.ratio_target") == "gumbel"
            and not (of.positive("loss.budget_weight") and of.positive("loss.gamma"))
        ),
        "with method.ratio_target=gumbel nothing holds the ratio: set loss.budget_weight and loss.gamma above 0",
    ),
    (
        lambda of: of("method.ratio_target") == "gumbel" and of("retainer.gate_temperature") is not None,
        "method.ratio_target=gumbel has its own gate: set retainer.gate_temperature=null",
    ),
    (
        lambda of: (
            of.kind("loss") == "ADTPLoss"
            and of.positive("loss.budget_weight")
            and of.kind("retainer") != "AdaptiveRatio"
        ),
        "loss.budget_weight holds the ratio of an adaptive retainer: set it to 0, or retainer=adaptive",
    ),
    (
        lambda of: of("retainer.summary") == "cls" and of("retainer.layer") == 0,
        "retainer.summary=cls is the same for every text at layer 0: set retainer.summary=mean, or retainer.layer",
    ),
    (
        lambda of: of.kind("method") == "ADTP" and of("teacher") is None and of.positive("loss.alpha"),
        "without a teacher there is nothing to distil: set loss.alpha=0, or choose a teacher",
    ),
    (
        lambda of: of.kind("method") == "ADTP" and of("teacher") is None and of("loss.kappa_max") not in (None, 1),
        "without a teacher there are no attributions of it to mix in: set loss.kappa_max=1, or choose a teacher",
    ),
    (
        lambda of: (
            bool(of("teacher.initialises_student"))
            and any(of(f"teacher.backbone.{key}") != of(f"backbone.{key}") for key in ("name", "random"))
        ),
        "the student cannot start from a teacher with another backbone: set teacher.initialises_student=false",
    ),
    (
        lambda of: of.kind("scorer") == "ExactAttention" and of("budget") is not None,
        "scorer=exact_attention costs a whole unpruned pass, so no budget can be met: choose scorer=approx_attention",
    ),
    (
        lambda of: bool(of("method.trains_approx")) and of.kind("retainer") != "Concrete",
        "method.trains_approx=true needs masks that carry a gradient: choose retainer=concrete",
    ),
    (
        lambda of: bool(of("method.trains_approx")) and of.kind("scorer") == "ExactAttention",
        "method.trains_approx=true trains an ApproxNet, and scorer=exact_attention has none: choose approx_attention",
    ),
    (
        lambda of: (
            bool(of("method.regularises_hard")) and (of.kind("retainer") != "Concrete" or of("budget") is not None)
        ),
        "method.regularises_hard=true moves θ under a hard plan: it needs retainer=concrete, and no budget",
    ),
    (
        lambda of: of("retainer.k_base") not in (None, "valid") and of("budget") is not None,
        "a budget is met by k as a share of the real tokens: set retainer.k_base=valid, or no budget",
    ),
    *(
        (
            lambda of, method=method: of.kind("method") == method and of.kind("scorer") == "TokenSaliency",
            f"{name} trains no token saliency: choose scorer=attention_mass or random",
        )
        for method, name in (("ManualThreshold", "manual_threshold"), ("ManualTopK", "manual_topk"))
    ),
    *(
        (
            lambda of, method=method: (
                of.kind("method") == method
                and of("teacher") is not None
                and not of("teacher.initialises_student")
                and of("start_from") is None
            ),
            f"{name} learns nothing from a teacher but its weights: choose teacher=same, or name start_from",
        )
        for method, name in PRUNES_A_DENSE_MODEL
    ),
    *(
        (
            lambda of, method=method: (
                of.kind("method") == method
                and of("teacher") is None
                and of("start_from") is None
                and (method == "STTABT" or of("method.epochs") == 0)
            ),
            f"{name} needs a model that was trained on the task: choose teacher=same, or name start_from",
        )
        for method, name in PRUNES_A_DENSE_MODEL
    ),
    (
        lambda of: of("text") is not None and of.kind("scorer") != "ApproxAttention",
        "text is what an ApproxNet is distilled on: choose +method=sttabt scorer=approx_attention, or no text",
    ),
    (
        lambda of: of("start_from") is not None and bool(of("teacher.initialises_student")),
        "a model starts from its teacher or from start_from: set teacher.initialises_student=false",
    ),
    (
        lambda of: of("data.source") not in (None, *SOURCES),
        f"data.source is one of {', '.join(SOURCES)}, or null",
    ),
    (
        lambda of: of("data.source") == "directory" and of("data.root") is None,
        "data.source=directory needs the directory: set data.root=DIR or the environment variable TOKPRUNE_DATA",
    ),
    (
        lambda of: of("data.source") == "directory" and of("task.directory") is None,
        "data.source=directory: this task has no directory; see task.directory",
    ),
    (
        lambda of: of("data.source") == "hub" and of("task.hub") is None,
        "data.source=hub: this task is not on the hub; see task.hub",
    ),
    (
        lambda of: not any(of(f"backbone.{key}") for key in ("path", "hub", "wheel", "weights_root")),
        "the backbone names no place to read from: set backbone.path, hub, wheel or weights_root",
    ),
]
"""Pairs of choices that make no sense, and the sentence that says what to do instead."""


def impossible_pairs(cfg: DictConfig) -> Iterator[str]:
    """A sentence for each pair that the configuration has chosen."""
    chosen = Chosen(cfg)
    return (sentence for is_impossible, sentence in IMPOSSIBLE_PAIRS if is_impossible(chosen))
