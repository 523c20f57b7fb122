// Moves the cursor with the sound, and lets the sound jump to what is clicked. Gradio draws parts of the page anew at any time, so
// listeners belong to the document, and positions are variables of the style sheet, which new parts find.
(() => {
  let centre = 0.5; // of the view of a zoomed strip, as a fraction of the recording
  let shown = 0; // the time at which the cursor was last brought into sight
  let until = Infinity; // the end of the event that is played
  const view = () => document.querySelector(".sslam-scroll");
  const sound = () => document.getElementById("sslam-sound");

  function follow() {
    const audio = sound();
    if (!audio) return;
    const time = audio.currentTime, at = time / Number(audio.dataset.duration);
    document.documentElement.style.setProperty("--sslam-at", Math.min(1, at));
    for (const part of document.querySelectorAll("[data-span]")) {
      const [start, end] = part.dataset.span.split(" ").map(Number);
      part.classList.toggle("sslam-now", !audio.paused && start <= time && time < end);
    }
    if (time >= until) audio.pause();
    if (time !== shown) reveal(at);
    shown = time;
  }

  function reveal(at) {
    const strip = view();
    if (!strip) return;
    const place = at * strip.scrollWidth - strip.scrollLeft;
    if (place < 0 || place > strip.clientWidth) strip.scrollLeft = at * strip.scrollWidth - strip.clientWidth / 10;
  }

  function frame() {
    follow();
    if (sound() && !sound().paused) requestAnimationFrame(frame);
  }

  // --- the span that is compared with others: two numbers, which a page without an index does not have
  const number = (name) => document.querySelector(`#${name} input`);

  function choose(start, end) {
    if (!number("from")) return;
    for (const [name, value] of [["from", start], ["to", end]]) {
      number(name).value = value.toFixed(2);
      number(name).dispatchEvent(new Event("input", { bubbles: true })); // by which Gradio knows
    }
  }

  function mark() {
    const audio = sound(), style = document.documentElement.style;
    if (!audio || !number("from")) return;
    const [start, end] = ["from", "to"].map((name) => Math.min(1, Math.max(0, Number(number(name).value) / Number(audio.dataset.duration))));
    style.setProperty("--sslam-from", start);
    style.setProperty("--sslam-to", Math.max(start, end));
    style.setProperty("--sslam-chosen", "block");
  }

  const at = (track, event) => {
    const box = track.getBoundingClientRect();
    return Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)) * Number(sound().dataset.duration);
  };
  let drag = null; // where it began, and whether it has moved; fingers scroll instead
  document.addEventListener("pointerdown", (event) => {
    const track = event.target.closest?.("#lanes .sslam-track");
    drag = track && sound() && event.pointerType !== "touch" && event.button === 0 ? { track, x: event.clientX, start: at(track, event) } : null;
  });
  document.addEventListener("pointermove", (event) => {
    if (!drag || !(event.buttons & 1)) return;
    drag.moved ||= Math.abs(event.clientX - drag.x) > 4;
    if (drag.moved) choose(...[drag.start, at(drag.track, event)].sort((a, b) => a - b));
  });
  document.addEventListener("pointerup", () => setTimeout(() => { drag = null; })); // after the click that follows
  document.addEventListener("dragstart", (event) => { if (drag) event.preventDefault(); }); // of the picture itself
  document.addEventListener("input", (event) => { if (event.target.closest("#from, #to")) mark(); });

  document.addEventListener("click", (event) => {
    const audio = sound(), target = event.target.closest?.("[data-start], #lanes .sslam-track");
    if (!audio || !target || drag?.moved) return;
    if (target.dataset.start !== undefined) {
      const [start, end] = target.closest("[data-span]").dataset.span.split(" ").map(Number);
      choose(start, end);
      if (!audio.paused && start <= audio.currentTime && audio.currentTime < end) return audio.pause(); // its sound is playing
      audio.currentTime = start;
      until = end;
      audio.play();
    } else {
      until = Infinity;
      audio.currentTime = at(target, event);
    }
  });
  // The keys of a player, for the picture. The browser's own player has them itself.
  const STEP = 1; // seconds
  document.addEventListener("keydown", (event) => {
    const audio = sound();
    if (!audio || !event.target.matches?.(".sslam-scroll") || event.ctrlKey || event.metaKey || event.altKey) return;
    const place = { ArrowLeft: audio.currentTime - STEP, ArrowRight: audio.currentTime + STEP, Home: 0, End: audio.duration }[event.key];
    if (event.key === " ") audio.paused ? audio.play() : audio.pause();
    else if (place !== undefined) audio.currentTime = Math.min(audio.duration, Math.max(0, place));
    else return;
    event.preventDefault();
  });

  // A list of choices is closed before the tabulator leaves it: Gradio's own handler would open it anew. And browsers let the tabulator
  // stop at a list that scrolls.
  document.addEventListener("keydown", (event) => {
    const lists = event.key === "Tab" ? document.querySelectorAll("ul[role=listbox]") : [];
    for (const list of lists) list.tabIndex = -1;
    if (!lists.length) return;
    event.target.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
    event.stopPropagation();
  }, true);

  // Gradio says nothing when the browser does not give the microphone for a recording.
  const refused = (text) => { const part = document.querySelector(".sslam-refused"); if (part) part.textContent = text; };
  window.addEventListener("unhandledrejection", ({ reason }) => {
    if (/microphone/i.test(reason?.message ?? "")) refused("The browser does not give the microphone: allow it for this page, and press Record again.");
  });
  document.addEventListener("click", ({ target }) => { if (target.closest?.("#microphone")) refused(""); }, true);

  // A file may be dropped anywhere: without this the browser would leave the page for it.
  const carries = (event) => event.dataTransfer?.types.includes("Files") && !event.defaultPrevented; // as by Gradio's field
  document.addEventListener("dragover", (event) => { if (carries(event)) event.preventDefault(); });
  document.addEventListener("drop", (event) => {
    const input = document.querySelector("#file input[type=file]");
    if (!carries(event) || !input) return;
    event.preventDefault();
    const first = new DataTransfer();
    first.items.add(event.dataTransfer.files[0]);
    input.files = first.files;
    input.dispatchEvent(new Event("change", { bubbles: true })); // by which Gradio knows
  });
  // What is said of a former file goes as soon as another one is chosen, also one that Gradio then rejects.
  const forget = ({ target }) => target.closest?.("#file") && document.getElementById("clear")?.click();
  document.addEventListener("change", forget, true);
  document.addEventListener("drop", forget, true);

  document.addEventListener("scroll", ({ target }) => {
    if (target === view()) centre = (target.scrollLeft + target.clientWidth / 2) / target.scrollWidth;
  }, true);
  // After another threshold or zoom: the same part of the recording stays in sight.
  document.addEventListener("sslam-drawn", () => {
    const strip = view();
    if (strip) strip.scrollLeft = centre * strip.scrollWidth - strip.clientWidth / 2;
    follow();
    mark();
  });
  // Media events do not bubble: they are caught on their way down.
  document.addEventListener("pause", ({ target }) => { if (target === sound()) until = Infinity; }, true);
  for (const name of ["loadedmetadata", "seeked", "pause", "timeupdate"]) document.addEventListener(name, follow, true);
  document.addEventListener("play", ({ target }) => {
    for (const other of document.querySelectorAll("#sslam-sound, #sslam-match")) if (other !== target) other.pause();
    frame();
  }, true);
})();
