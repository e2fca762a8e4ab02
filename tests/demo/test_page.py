"""The page in Chromium: it loads, samples what Python samples, and can be used by keyboard and on a phone."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.data.builtin import digits
from ddpm_hf.demo.site import WEB, add_runtime, write_site
from ddpm_hf.diffusion.timesteps import spaced_timesteps
from ddpm_hf.evaluation.digits import DigitsJudge
from ddpm_hf.schedulers.ddim import DDIMSchedulerCustom
from tests.demo.conftest import MILLISECONDS

MODELS = Path(__file__).resolve().parents[2] / "model_cards"
NAMES = ("digits", "mnist")
STILL = {"reduced_motion": "reduce"}  # the page then does not play by itself
# The pixels, 0 to 255, of every canvas of a list of elements.
READ = """canvases => canvases.map(canvas => {
    const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return Array.from({length: data.length / 4}, (_, i) => data[4 * i]);
})"""


@pytest.fixture(scope="module")
def folder(browser, tmp_path_factory) -> Path:
    """The sites of the shipped models."""
    folder = tmp_path_factory.mktemp("sites")
    if not add_runtime(folder / NAMES[0]):
        pytest.skip("npm cannot get onnxruntime-web")
    shutil.copytree(folder / NAMES[0] / "vendor", folder / NAMES[1] / "vendor")
    for name in NAMES:
        write_site(MODELS / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def address(folder, serve) -> str:
    return serve(folder)


@pytest.fixture
def open_page(browser, address):
    """Opens the page of a model, and waits until it can be used."""
    contexts = []

    def start(name: str, **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **STILL, **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(MILLISECONDS)
        page.goto(f"{address}/{name}/")
        page.wait_for_selector("main:not([inert])")
        return page

    yield start
    for context in contexts:
        context.close()


def pixels(page, selector: str) -> np.ndarray:
    return np.array(page.eval_on_selector_all(selector, READ))


def press(page, button: str, element: str | None = None) -> None:
    """Press a button, and wait for the element that is busy then."""
    page.click(f"#{button}")
    if element is not None:
        page.wait_for_selector(f"#{element}[aria-busy=false]")


def reach_end(page, steps: int) -> None:
    page.focus("#position")
    page.keyboard.press("End")
    page.wait_for_selector(f"#status:has-text('The image after {steps} steps.')")


def choose(page, **values: str | int) -> None:
    for name, value in values.items():
        if name in ("guidance", "eta", "seed"):
            page.fill(f"#{name}", str(value))
            page.dispatch_event(f"#{name}", "change")
        else:
            page.select_option(f"#{name}", str(value))


def python_samples(name: str, noise: list, steps: int, **options) -> torch.Tensor:
    """Images in [0, 1] of Python's DDIM from the same noise."""
    pipe = DDPMPipelineCustom.from_pretrained(MODELS / name)
    pipe.scheduler = DDIMSchedulerCustom.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    size = pipe.unet.config.sample_size
    latents = torch.tensor(noise).reshape(-1, 1, size, size)
    timesteps = spaced_timesteps(1000, steps, "trailing").tolist()
    return pipe(len(latents), latents=latents, timesteps=timesteps, output_type="pt", **options).images


def test_the_page_loads_without_errors_and_asks_no_other_host(open_page, browser, address):
    context = browser.new_context()
    page = context.new_page()
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    context.on("request", lambda request: requests.append(request.url))
    page.goto(f"{address}/digits/")
    # It plays by itself.
    page.wait_for_selector("#status:has-text('The image after 50 steps.')", timeout=MILLISECONDS)
    press(page, "make-ten", "ten")
    assert not problems
    assert {"app.js", "model.json"} <= {url.rpartition("/")[2] for url in requests}
    assert all(url.startswith((f"{address}/digits/", "data:", f"blob:{address}/")) for url in requests)
    assert context.cookies() == []
    kept = "(async () => [localStorage.length, sessionStorage.length, (await indexedDB.databases()).length])()"
    assert page.evaluate(kept) == [0, 0, 0]
    assert context.storage_state() == {"cookies": [], "origins": []}
    context.close()


def test_ddim_gives_the_image_that_python_gives(open_page):
    page = open_page("digits")
    choose(page, sampler="ddim", steps=20, seed=3)
    reach_end(page, 20)
    noise, image = page.evaluate(
        """async () => {
            const chain = ddpm.makeChain(ddpm.facts.alphas_cumprod, ddpm.spacedTimesteps(1000, 20));
            const x = ddpm.gaussian(3)(ddpm.size);
            let last;
            for await (last of ddpm.denoise(ddpm.facts, chain, {sampler: "ddim"}, x, [], ddpm.predict));
            return [[...x], [...last.x_prev]];
        }"""
    )
    expected = python_samples("digits", noise, 20).flatten().numpy()
    np.testing.assert_allclose((np.array(image) / 2 + 0.5).clip(0, 1), expected, atol=5e-4)
    for canvas in ("#sample", "#guess"):
        np.testing.assert_allclose(pixels(page, canvas)[0], 255 * expected, atol=0.7)


def test_classes_and_guidance_are_those_of_python(open_page):
    page = open_page("mnist")
    choose(page, sampler="ddim", steps=5, seed=5, guidance=2)
    press(page, "make-ten", "ten")
    noise = page.evaluate("Array.from({length: 10}, (_, i) => [...ddpm.gaussian(5, i)(ddpm.size)])")
    expected = python_samples("mnist", noise, 5, class_labels=list(range(10)), guidance_scale=2.0)
    np.testing.assert_allclose(pixels(page, "#ten canvas"), 255 * expected.flatten(1).numpy(), atol=0.7)
    captions = page.eval_on_selector_all("#ten figcaption", "all => all.map(each => each.textContent)")
    assert captions == list("0123456789")
    # The image on show has the class that is chosen, and the noise of index 0.
    choose(page, label="0")
    reach_end(page, 5)
    assert (pixels(page, "#sample")[0] == pixels(page, "#ten canvas")[0]).all()


def test_without_labels_a_prediction_is_that_of_no_class(open_page):
    page = open_page("mnist")
    given, taken = page.evaluate(
        """async () => {
            const x = ddpm.gaussian(3)(2 * ddpm.size), none = ddpm.facts.null_class;
            return [[...await ddpm.predict(x, 500)], [...await ddpm.predict(x, 500, [none, none])]];
        }"""
    )
    assert given == taken


def test_samples_are_recognized_as_often_as_those_of_python(open_page):
    from scipy.stats import fisher_exact

    page, made = open_page("digits"), []
    for seed in range(10):
        choose(page, seed=seed, steps=20)
        press(page, "make-ten", "ten")
        made.append(pixels(page, "#ten canvas"))
    made = np.concatenate(made) / 255
    pipe = DDPMPipelineCustom.from_pretrained(MODELS / "digits")
    pipe.set_progress_bar_config(disable=True)
    timesteps = spaced_timesteps(1000, 20, "trailing").tolist()
    expected = pipe(200, seed=0, timesteps=timesteps, output_type="np").images
    judge = DigitsJudge(digits())
    (share, classes), (share_expected, _) = judge.recognized(made), judge.recognized(expected.reshape(200, 64))
    table = [[round(n * s), n - round(n * s)] for n, s in ((100, share), (200, share_expected))]
    assert len(np.unique(made, axis=0)) == 100 and len(set(classes)) == 10
    assert fisher_exact(table).pvalue > 1e-3, f"{share} and {share_expected}"
    assert share_expected > 0.5


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_numbers_of_the_equation_add_up(open_page, sampler):
    page = open_page("mnist")
    choose(page, sampler=sampler, steps=10, **({"eta": 0.5} if sampler == "ddim" else {}))
    page.fill("#position", "6")
    page.wait_for_selector("#status:has-text('After 6 of 10 steps, t = 399.')")
    lines = page.eval_on_selector_all("#formulas div", "all => all.map(each => each.textContent)")
    values, result = lines[-1].replace("−", "-").replace("·", "*").split("=")
    assert re.fullmatch(r"[-+*().\d ]+", values) and eval(values) == pytest.approx(float(result), abs=5e-3)
    assert page.inner_text("#step-text").startswith("From t = 399 to t = 299, ")
    # In the charts, too.
    bar = float(page.evaluate("ddpm.facts.alphas_cumprod[399]"))
    assert f"{bar**0.5:.3f}" in page.inner_text("#signal figcaption")
    assert f"{(1 - bar) ** 0.5:.3f}" in lines[1]


def test_the_ends_of_an_interpolation_are_the_images_of_its_seeds(open_page):
    page = open_page("digits")
    choose(page, sampler="ddim", steps=10)
    page.fill("#seed-a", "4")
    page.fill("#seed-b", "8")
    page.click("#seeds button")
    page.wait_for_selector("#between[aria-busy=false] canvas")
    images = pixels(page, "#between canvas")
    assert len(np.unique(images, axis=0)) == 8
    for seed, image in ((4, images[0]), (8, images[-1])):
        choose(page, seed=seed)
        reach_end(page, 10)
        np.testing.assert_allclose(pixels(page, "#sample")[0], image, atol=1)


def test_a_changed_control_cancels_what_runs(open_page):
    page = open_page("digits", reduced_motion="no-preference")  # each step is painted
    choose(page, steps=1000)
    page.click("#make-ten")
    page.wait_for_selector("#ten[aria-busy=true]")
    choose(page, steps=5)
    page.wait_for_selector("#ten[aria-busy=false]")
    reach_end(page, 5)
    unfinished = pixels(page, "#ten canvas")
    page.wait_for_timeout(300)
    assert (pixels(page, "#ten canvas") == unfinished).all()


def tab_to(page, name: str) -> None:
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == name:
            return
    pytest.fail(f"{name} cannot be reached by Tab")


def test_the_keyboard_alone_denoises_and_draws(open_page):
    page = open_page("digits")
    start = pixels(page, "#sample")
    tab_to(page, "position")
    page.keyboard.press("End")
    page.wait_for_selector("#status:has-text('The image after 50 steps.')")
    assert page.get_attribute("#position", "aria-valuetext") == "The image after 50 steps."
    assert (pixels(page, "#sample") != start).any()
    tab_to(page, "back")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status:has-text('After 49 of 50 steps, t = 19.')")
    tab_to(page, "canvas")
    page.keyboard.press("Space")
    assert (dot := pixels(page, "#canvas")).max() > 200
    for key in ("ArrowUp", "Shift+ArrowLeft", "Shift+ArrowLeft"):
        page.keyboard.press(key)
    drawn = pixels(page, "#canvas")
    assert (drawn >= dot).all() and drawn.sum() > dot.sum()
    assert page.evaluate("document.activeElement.id") == "canvas"
    tab_to(page, "noise")
    page.keyboard.press("Enter")
    assert (pixels(page, "#noised") != drawn).any()
    tab_to(page, "restore")
    page.keyboard.press("Enter")
    page.wait_for_selector("#restored-figure[aria-busy=false]")
    assert pixels(page, "#restored").max() > 200


def test_a_drawing_is_noised_and_denoised_from_a_timestep(open_page):
    page = open_page("digits")
    choose(page, sampler="ddim", steps=10)
    reach_end(page, 10)
    press(page, "use-guess")
    image = pixels(page, "#canvas")
    assert (image == pixels(page, "#guess")).all()
    page.fill("#level", "9")  # the last of ten steps: little noise
    press(page, "restore", "restored-figure")
    assert page.inner_text("#level-value") == "t = 99"
    assert np.abs(pixels(page, "#restored") - image).mean() < np.abs(pixels(page, "#noised") - image).mean() < 60
    page.fill("#level", "0")
    assert np.corrcoef(pixels(page, "#noised")[0], image[0])[0, 1] < 0.5
    press(page, "clear")
    assert pixels(page, "#canvas").max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_phone_shows_all_of_it_and_draws_by_touch(open_page, name):
    page = open_page(name, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    choose(page, steps=5)
    reach_end(page, 5)
    press(page, "make-ten", "ten")
    page.click("#seeds button")
    page.wait_for_selector("#between[aria-busy=false] canvas")
    page.locator("#canvas").tap()
    assert pixels(page, "#canvas").max() > 100
    width, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width == inner == 360
    small = "all => all.filter(each => each.offsetParent && each.offsetHeight < 44).map(each => each.id)"
    assert page.eval_on_selector_all("button, select", small) == []


def test_controls_have_labels_and_errors_are_shown(open_page, browser, serve):
    page = open_page("mnist")
    named = "all => all.filter(each => each.type != 'button' && !each.labels?.length).map(each => each.outerHTML)"
    assert page.eval_on_selector_all("input, select", named) == []
    unnamed = "all => all.filter(each => !each.ariaLabel).map(each => each.outerHTML)"
    assert page.eval_on_selector_all("canvas, svg", unnamed) == []
    page = browser.new_page()
    page.set_default_timeout(MILLISECONDS)
    page.goto(serve(WEB))
    page.wait_for_selector("#error:has-text('model.json could not be loaded (404)')")
    page.add_init_script("delete window.WebAssembly")
    page.reload()
    page.wait_for_selector("#error:has-text('no WebAssembly')")
    page.close()


def test_without_a_copy_the_runtime_comes_from_the_cdn(browser, folder, serve, tmp_path):
    site = shutil.copytree(folder / "digits", tmp_path / "site", ignore=shutil.ignore_patterns("vendor"))
    asked, changed = [], []

    def answer(route):
        asked.append(route.request.url)
        body = (folder / "digits" / "vendor" / route.request.url.rpartition("/")[2]).read_bytes()
        route.fulfill(body=b"changed" if changed else body, headers={"Access-Control-Allow-Origin": "*"})

    context = browser.new_context(**STILL)
    context.route("https://cdn.jsdelivr.net/**", answer)
    page = context.new_page()
    page.set_default_timeout(MILLISECONDS)
    page.goto(serve(site))
    page.wait_for_selector("main:not([inert])")
    assert len(asked) == 2 and all(url.startswith("https://cdn.jsdelivr.net/npm/onnxruntime-web@1.") for url in asked)
    changed.append(True)  # the browser refuses a file with another hash
    page.reload()
    page.wait_for_selector("#error:has-text('could not be loaded')")
    context.close()
