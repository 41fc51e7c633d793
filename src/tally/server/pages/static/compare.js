// How far a picture that was made of another covers it: as far as the slider below says.
document.addEventListener("input", (event) => {
  const figure = event.target.closest(".compare");
  if (figure) figure.style.setProperty("--at", `${event.target.value}%`);
});
