"""Work in several processes, by joblib (an extra)."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from influence_kit.core.arguments import shown
from influence_kit.errors import InvalidArgumentError


def process_count(n_jobs: Any) -> int:
    """How many processes ``n_jobs`` stands for, as joblib counts them (-1: one per core).

    Raises:
        InvalidArgumentError: if it is not such a number, or joblib is needed and not installed.
    """
    if isinstance(n_jobs, bool) or not isinstance(n_jobs, int) or n_jobs == 0:
        raise InvalidArgumentError(
            f"`n_jobs` is {shown(n_jobs)}; it must be a number of processes, or -1 for one per core"
        )
    return 1 if n_jobs == 1 else int(_joblib(n_jobs).effective_n_jobs(n_jobs))


def results(
    function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], n_jobs: int, ordered: bool
) -> Iterator[Any]:
    """What the function returns for each tuple of arguments, here or in other processes.

    Args:
        function: what is called; other processes must be able to import it.
        calls: the arguments of each call.
        n_jobs: the processes, as joblib counts them; 1 is this one.
        ordered: yield the results in the order of the calls; otherwise as they are finished.
    """
    if n_jobs == 1:
        return (function(*call) for call in calls)
    joblib = _joblib(n_jobs)
    way = "generator" if ordered else "generator_unordered"
    parallel = joblib.Parallel(n_jobs=n_jobs, return_as=way)
    done: Iterator[Any] = parallel(joblib.delayed(function)(*call) for call in calls)
    return done


def _joblib(n_jobs: int) -> Any:
    try:
        import joblib
    except ImportError as error:
        raise InvalidArgumentError(
            f"n_jobs={n_jobs} runs in processes of joblib, which is not installed: pip install "
            "'influence_kit[parallel]', or use n_jobs=1"
        ) from error
    return joblib
