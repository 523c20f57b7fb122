// Moves the cursor with the sound, and lets the sound jump to what is clicked. Gradio draws parts of the page anew at any time, so
// listeners belong to the document, and positions are variables of the style sheet, which new parts find.
(() => {
  let centre = 0.5; // of the view of a zoomed strip, as a fraction of the recording
  let shown = 0; // the time at which the cursor was last brought into sight
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

  document.addEventListener("click", (event) => {
    const audio = sound(), target = event.target.closest?.("[data-start], .sslam-track");
    if (!audio || !target) return;
    if (target.dataset.start !== undefined) {
      audio.currentTime = Number(target.dataset.start);
      audio.play();
    } else {
      const box = target.getBoundingClientRect();
      audio.currentTime = ((event.clientX - box.left) / box.width) * Number(audio.dataset.duration);
    }
  });
  document.addEventListener("scroll", ({ target }) => {
    if (target === view()) centre = (target.scrollLeft + target.clientWidth / 2) / target.scrollWidth;
  }, true);
  // After another threshold or zoom: the same part of the recording stays in sight.
  document.addEventListener("sslam-drawn", () => {
    const strip = view();
    if (strip) strip.scrollLeft = centre * strip.scrollWidth - strip.clientWidth / 2;
    follow();
  });
  // Media events do not bubble: they are caught on their way down.
  for (const name of ["loadedmetadata", "seeked", "pause", "timeupdate"]) document.addEventListener(name, follow, true);
  document.addEventListener("play", frame, true);
})();
